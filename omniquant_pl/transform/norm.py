"""Normalization to the linears that read it."""

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
)

__all__ = ["NormToLinears", "NormToLinearsPair"]


@dataclass(frozen=True)
class NormToLinears:
    """Declares that every reader of a norm is one of these linears.

    Attributes:
        norm: Dotted name of the norm; it has a ``weight``.
        linears: Dotted names of all linears that read its output.
    """

    norm: str
    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return self.norm

    def build(self, tensors: Mapping[str, Tensor], _: AttentionShape) -> NormToLinearsPair:
        """Returns the learnable pair for a block with these weights."""
        return NormToLinearsPair(self, tensors[f"{self.norm}.weight"].numel())


class NormToLinearsPair(Pair):
    """Divides the norm's weight by the scale and multiplies the linears' columns by it.

    Args:
        layout: The operators.
        channels: Width of the norm.
    """

    def __init__(self, layout: NormToLinears, channels: int) -> None:
        super().__init__(channels)
        self.layout = layout

    @property
    @override
    def changed(self) -> tuple[str, ...]:
        return (f"{self.layout.norm}.weight", *(f"{name}.weight" for name in self.layout.linears))

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        norm = f"{self.layout.norm}.weight"
        tensors[norm] = tensors[norm] / self.scale
        for name in self.layout.linears:
            scale_columns(tensors, name, self.scale)

    @override
    @torch.no_grad()
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        weights = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in self.layout.linears])
        activation = inputs[self.layout.linears[0]].magnitude
        self.scale.copy_(initial_scale(activation, weights.amax(0), alpha))
