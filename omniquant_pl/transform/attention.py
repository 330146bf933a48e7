"""The pairs inside attention: values to output, queries to keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.errors import unmasked
from omniquant_pl.quant import ChannelRange
from omniquant_pl.transform.base import (
    BlockTensors,
    Pair,
    add_shift,
    initial_scale,
    range_of,
    scale_columns,
    scale_rows,
)
from omniquant_pl.transform.heads import AttentionShape, Part, linear_and_rows

__all__ = ["NormedQueryToKey", "QueryToKey", "ValueToOutput"]


@dataclass(frozen=True)
class ValueToOutput:
    """Declares the value and the output projection of an attention module.

    Attributes:
        value: Dotted name of the value projection, or the part of a fused linear that it is.
        output: Dotted name of the output projection.
    """

    value: str | Part
    output: str

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return str(self.value)

    def build(self, tensors: Mapping[str, Tensor], shape: AttentionShape, shift: bool) -> ValueToOutputPair:
        """Return the learnable pair for a block with these weights and heads; a shift where both have biases."""
        value, rows = linear_and_rows(self.value, shape, tensors)
        biases = f"{value}.bias" in tensors and f"{self.output}.bias" in tensors
        return ValueToOutputPair(value, rows, self.output, shape, shift and biases)


class ValueToOutputPair(Pair):
    """Divides the value projection's rows by the scale and multiplies the output projection's columns by it.

    All query heads that read one kv head share its scale, whence one scale ``[kv_heads * head_dim]``. A shift of the
    values passes through attention as it is, because the probabilities of a token sum to one.

    Args:
        value: The linear that computes the values.
        rows: Its output channels that are values; ``None`` for all.
        output: The output projection.
        shape: The heads.
        shift: Whether a shift is learned.
    """

    def __init__(self, value: str, rows: Tensor | None, output: str, shape: AttentionShape, shift: bool) -> None:
        channels = shape.kv_heads * shape.head_dim
        super().__init__(channels, channels if shift else None)
        self.register_buffer("rows", rows, persistent=False)
        self.rows: Tensor | None
        self.value = value
        self.output = output
        self.shape = shape

    @property
    @override
    @unmasked
    def changed(self) -> tuple[str, ...]:
        names = (f"{self.value}.weight", f"{self.value}.bias", f"{self.output}.weight")
        return names if self.shift is None else (*names, f"{self.output}.bias")

    @property
    @override
    @unmasked
    def consumers(self) -> tuple[str, ...]:
        return (self.output,)

    @override
    def spread(self, values: Tensor) -> Tensor:
        return self.shape.spread(values)

    @override
    def gather(self, per_channel: Tensor) -> Tensor:
        return self.shape.gather(per_channel)

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        if self.shift is not None:
            bias, moved = tensors[f"{self.value}.bias"], -self.shift
            if self.rows is not None:
                moved = torch.zeros_like(bias).index_put((self.rows,), moved)
            tensors[f"{self.value}.bias"] = bias + moved
            add_shift(tensors, self.output, self.spread(self.shift))
        scale_rows(tensors, self.value, 1 / self.scale, self.rows)
        scale_columns(tensors, self.output, self.spread(self.scale))

    @override
    @torch.no_grad()
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        activation = range_of(inputs, self.consumers)
        if activation is None:
            return
        weight = self.gather(tensors[f"{self.output}.weight"].abs().amax(0))
        self.scale.copy_(initial_scale(self.gather(activation.magnitude), weight, alpha))
        if self.shift is not None:
            high, low = self.gather(activation.high), -self.gather(-activation.low)
            self.shift.copy_((high + low) / 2)


@dataclass(frozen=True)
class QueryToKey:
    """Declares the query and the key projection of an attention module.

    Attributes:
        query: Dotted name of the query projection, or the part of a fused linear that it is.
        key: The key projection likewise.
    """

    query: str | Part
    key: str | Part

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return str(self.query)

    def build(self, tensors: Mapping[str, Tensor], shape: AttentionShape, _: bool) -> QueryToKeyPair:
        """Return the learnable pair for a block with these weights and heads."""
        query, key = (linear_and_rows(projection, shape, tensors) for projection in (self.query, self.key))
        return QueryToKeyPair(query, key, shape)


class QueryToKeyPair(Pair):
    """Divides the query projection's rows by the scale and multiplies the key projection's rows by it.

    A scale commutes with the rotary embedding only if the two channels of one rotary pair share it; the query heads
    of one kv head share it as well. One scale ``[kv_heads * rotary_scales]``. A scale ``[kv_heads * head_dim]``, one
    for every channel as the original implementation learns it, is applied as it is.

    Args:
        query: The linear that computes the queries and its output channels that are queries (``None`` for all).
        key: The same of the keys.
        shape: The heads.
    """

    def __init__(self, query: tuple[str, Tensor | None], key: tuple[str, Tensor | None], shape: AttentionShape) -> None:
        super().__init__(shape.kv_heads * shape.rotary_scales)
        (self.query, query_rows), (self.key, key_rows) = query, key
        self.register_buffer("query_rows", query_rows, persistent=False)
        self.register_buffer("key_rows", key_rows, persistent=False)
        self.query_rows: Tensor | None
        self.key_rows: Tensor | None
        self.shape = shape

    @property
    @override
    @unmasked
    def changed(self) -> tuple[str, ...]:
        return tuple(f"{name}.{kind}" for name in (self.query, self.key) for kind in ("weight", "bias"))

    @property
    @override
    @unmasked
    def other_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.shape.kv_heads * self.shape.head_dim,),)

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        shared = tuple(self.scale.shape) not in self.other_shapes
        per_channel = self.shape.spread_rotary(self.scale) if shared else self.scale  # [kv_heads * head_dim]
        scale_rows(tensors, self.query, 1 / self.shape.spread(per_channel), self.query_rows)
        scale_rows(tensors, self.key, per_channel, self.key_rows)

    @override
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        """Leave the scale at one, as the original does: both sides are quantized alike."""


@dataclass(frozen=True)
class NormedQueryToKey:
    """Declares the norms that queries and keys pass, head by head, before the rotary embedding.

    Attributes:
        query_norm: Dotted name of the queries' norm; its ``weight`` is ``[head_dim]`` for all heads, its ``bias``, if
            it has one, as well.
        key_norm: The keys' likewise.
        offset: What the norms add to their weights: 1 in Gemma.
    """

    query_norm: str
    key_norm: str
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return self.query_norm

    def build(self, _: Mapping[str, Tensor], shape: AttentionShape, __: bool) -> NormedQueryToKeyPair:
        """Return the learnable pair for these heads."""
        return NormedQueryToKeyPair(self, shape)


class NormedQueryToKeyPair(Pair):
    """Divides the queries' norm by the scale and multiplies the keys' by it; one scale ``[rotary_scales]``.

    Args:
        layout: The operators.
        shape: The heads.
    """

    def __init__(self, layout: NormedQueryToKey, shape: AttentionShape) -> None:
        super().__init__(shape.rotary_scales)
        self.layout = layout
        self.shape = shape

    @property
    @override
    @unmasked
    def changed(self) -> tuple[str, ...]:
        norms = (self.layout.query_norm, self.layout.key_norm)
        return tuple(f"{name}.{kind}" for name in norms for kind in ("weight", "bias"))

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        per_channel, offset = self.shape.spread_rotary(self.scale), self.layout.offset
        for norm, factor in ((self.layout.query_norm, 1 / per_channel), (self.layout.key_norm, per_channel)):
            weight, bias = f"{norm}.weight", f"{norm}.bias"
            tensors[weight] = (tensors[weight] + offset) * factor - offset
            if bias in tensors:
                tensors[bias] = tensors[bias] * factor

    @override
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        """Leave the scale at one: both sides are quantized alike."""
