"""Normalization to the linears that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.errors import unmasked
from omniquant_pl.quant import ChannelRange
from omniquant_pl.transform.base import BlockTensors, Pair, add_shift, initial_scale, range_of, scale_columns
from omniquant_pl.transform.heads import AttentionShape

__all__ = ["NormToLinears", "NormToLinearsPair"]


@dataclass(frozen=True)
class NormToLinears:
    """Declares that every reader of a norm is one of these linears.

    Attributes:
        norm: Dotted name of the norm; it has a ``weight``.
        linears: Dotted names of the quantized linears that read its output.
        others: Further readers, which stay in full precision: a router.
        offset: What the norm adds to its weight before it multiplies with it: 1 in Gemma.
    """

    norm: str
    linears: tuple[str, ...]
    others: tuple[str, ...] = ()
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return self.norm

    def build(self, tensors: Mapping[str, Tensor], _: AttentionShape, shift: bool) -> NormToLinearsPair:
        """Return the learnable pair for a block with these weights; a shift where norm and readers have biases."""
        channels = tensors[f"{self.norm}.weight"].numel()
        biases = [f"{name}.bias" in tensors for name in (self.norm, *self.linears, *self.others)]
        return NormToLinearsPair(self, channels, shift and all(biases))


class NormToLinearsPair(Pair):
    """Divides the norm's weight by the scale and multiplies the linears' columns by it; moves the shift likewise.

    Args:
        layout: The operators.
        channels: Width of the norm.
        shift: Whether a shift is learned.
    """

    def __init__(self, layout: NormToLinears, channels: int, shift: bool) -> None:
        super().__init__(channels, channels if shift else None)
        self.layout = layout

    @property
    @override
    @unmasked
    def changed(self) -> tuple[str, ...]:
        readers = (*self.layout.linears, *self.layout.others)
        names = (f"{self.layout.norm}.weight", f"{self.layout.norm}.bias", *(f"{name}.weight" for name in readers))
        return names if self.shift is None else (*names, *(f"{name}.bias" for name in readers))

    @property
    @override
    @unmasked
    def consumers(self) -> tuple[str, ...]:
        return self.layout.linears

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        weight, bias, offset = f"{self.layout.norm}.weight", f"{self.layout.norm}.bias", self.layout.offset
        tensors[weight] = (tensors[weight] + offset) / self.scale - offset if offset else tensors[weight] / self.scale
        if bias in tensors:
            moved = tensors[bias] if self.shift is None else tensors[bias] - self.shift
            tensors[bias] = moved / self.scale
        for name in (*self.layout.linears, *self.layout.others):
            if self.shift is not None:
                add_shift(tensors, name, self.shift)
            scale_columns(tensors, name, self.scale)

    @override
    @torch.no_grad()
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        activation = range_of(inputs, self.layout.linears)
        if activation is None:
            return
        weights = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in self.layout.linears])
        self.scale.copy_(initial_scale(activation.magnitude, weights.amax(0), alpha))
        if self.shift is not None:
            self.shift.copy_(activation.middle)
