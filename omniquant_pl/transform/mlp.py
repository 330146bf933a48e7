"""The pair inside an MLP: what scales the channels between its two matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.errors import unmasked
from omniquant_pl.quant import ChannelRange
from omniquant_pl.transform.base import BlockTensors, Pair, initial_scale, range_of, scale_columns, scale_rows
from omniquant_pl.transform.heads import AttentionShape, Part, linear_and_rows

__all__ = ["UpToDown", "UpToDownPair"]


@dataclass(frozen=True)
class UpToDown:
    """Declares the up and the down projection of an MLP.

    In a gated MLP the down projection's input is linear in up's output. Behind a ReLU it is not, but a positive scale
    passes through. No scale passes through a GELU.

    Attributes:
        up: Dotted name of the up projection, or the part of a fused linear that it is.
        down: Dotted name of the down projection.
        positive: Whether a ReLU stands between the two.
    """

    up: str | Part
    down: str
    positive: bool = False

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return str(self.up)

    def build(self, tensors: Mapping[str, Tensor], shape: AttentionShape, _: bool) -> UpToDownPair:
        """Return the learnable pair for a block with these weights."""
        up, rows = linear_and_rows(self.up, shape, tensors)
        return UpToDownPair(up, rows, self.down, tensors[f"{self.down}.weight"].shape[1], self.positive)


class UpToDownPair(Pair):
    """Divides the up projection's rows by the scale and multiplies the down projection's columns by it.

    Args:
        up: The linear that computes the up projection.
        rows: Its output channels that are the up projection's; ``None`` for all.
        down: The down projection.
        channels: Width of the MLP.
        positive: Whether the scale has to stay positive.
    """

    def __init__(self, up: str, rows: Tensor | None, down: str, channels: int, positive: bool) -> None:
        super().__init__(channels, positive=positive)
        self.register_buffer("rows", rows, persistent=False)
        self.rows: Tensor | None
        self.up = up
        self.down = down

    @property
    @override
    @unmasked
    def changed(self) -> tuple[str, ...]:
        return (f"{self.up}.weight", f"{self.up}.bias", f"{self.down}.weight")

    @property
    @override
    @unmasked
    def consumers(self) -> tuple[str, ...]:
        return (self.down,)

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        scale_rows(tensors, self.up, 1 / self.scale, self.rows)
        scale_columns(tensors, self.down, self.scale)

    @override
    @torch.no_grad()
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        activation = range_of(inputs, self.consumers)
        if activation is not None:
            weight = tensors[f"{self.down}.weight"].abs().amax(0)
            self.scale.copy_(initial_scale(activation.magnitude, weight, alpha))
