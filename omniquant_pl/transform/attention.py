"""The two pairs inside attention: values to output, queries to keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.quant import ChannelRange
from omniquant_pl.transform.base import (
    AttentionShape,
    BlockTensors,
    Pair,
    initial_scale,
    scale_columns,
    scale_rows,
)

__all__ = ["QueryToKey", "QueryToKeyPair", "ValueToOutput", "ValueToOutputPair"]


@dataclass(frozen=True)
class ValueToOutput:
    """Declares the value and the output projection of an attention module."""

    value: str
    output: str

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return self.value

    def build(self, _: Mapping[str, Tensor], shape: AttentionShape) -> ValueToOutputPair:
        """Returns the learnable pair for a block with these heads."""
        return ValueToOutputPair(self, shape)


class ValueToOutputPair(Pair):
    """Divides the value projection's rows by the scale and multiplies the output projection's columns by it.

    All query heads that read one kv head share its scale, whence one scale ``[kv_heads * head_dim]``.

    Args:
        layout: The operators.
        shape: The heads.
    """

    def __init__(self, layout: ValueToOutput, shape: AttentionShape) -> None:
        super().__init__(shape.kv_heads * shape.head_dim)
        self.layout = layout
        self.shape = shape

    @property
    @override
    def changed(self) -> tuple[str, ...]:
        return (
            f"{self.layout.value}.weight",
            f"{self.layout.value}.bias",
            f"{self.layout.output}.weight",
        )

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        scale_rows(tensors, self.layout.value, 1 / self.scale)
        scale_columns(tensors, self.layout.output, self.shape.spread(self.scale))

    @override
    @torch.no_grad()
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        weight = self.shape.gather(tensors[f"{self.layout.output}.weight"].abs().amax(0))
        activation = self.shape.gather(inputs[self.layout.output].magnitude)
        self.scale.copy_(initial_scale(activation, weight, alpha))


@dataclass(frozen=True)
class QueryToKey:
    """Declares the query and the key projection of an attention module with rotary embeddings."""

    query: str
    key: str

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return self.query

    def build(self, _: Mapping[str, Tensor], shape: AttentionShape) -> QueryToKeyPair:
        """Returns the learnable pair for a block with these heads."""
        return QueryToKeyPair(self, shape)


class QueryToKeyPair(Pair):
    """Divides the query projection's rows by the scale and multiplies the key projection's rows by it.

    A scale commutes with the rotary embedding only if the two channels of one rotary pair (``i`` and
    ``i + head_dim / 2``) share it; the query heads of one kv head share it as well. One scale
    ``[kv_heads * head_dim / 2]``.

    Args:
        layout: The operators.
        shape: The heads.
    """

    def __init__(self, layout: QueryToKey, shape: AttentionShape) -> None:
        super().__init__(shape.kv_heads * shape.head_dim // 2)
        self.layout = layout
        self.shape = shape

    @property
    @override
    def changed(self) -> tuple[str, ...]:
        return tuple(f"{name}.{kind}" for name in (self.layout.query, self.layout.key) for kind in ("weight", "bias"))

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        pairs = self.scale.view(self.shape.kv_heads, self.shape.head_dim // 2)
        per_channel = torch.cat((pairs, pairs), dim=1).reshape(-1)  # [kv_heads * head_dim]
        scale_rows(tensors, self.layout.query, 1 / self.shape.spread(per_channel))
        scale_rows(tensors, self.layout.key, per_channel)

    @override
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        """Leaves the scale at one, as the original does: both sides are quantized alike."""
