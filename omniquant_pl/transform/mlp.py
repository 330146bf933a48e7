"""Up to down projection of a gated MLP: the down projection's input is linear in up's output."""

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

__all__ = ["UpToDown", "UpToDownPair"]


@dataclass(frozen=True)
class UpToDown:
    """Declares the up and the down projection of a gated MLP."""

    up: str
    down: str

    @property
    def name(self) -> str:
        """The pair's name in files."""
        return self.up

    def build(self, tensors: Mapping[str, Tensor], _: AttentionShape) -> UpToDownPair:
        """Returns the learnable pair for a block with these weights."""
        return UpToDownPair(self, tensors[f"{self.down}.weight"].shape[1])


class UpToDownPair(Pair):
    """Divides the up projection's rows by the scale and multiplies the down projection's columns by it.

    Args:
        layout: The operators.
        channels: Width of the MLP.
    """

    def __init__(self, layout: UpToDown, channels: int) -> None:
        super().__init__(channels)
        self.layout = layout

    @property
    @override
    def changed(self) -> tuple[str, ...]:
        return (f"{self.layout.up}.weight", f"{self.layout.up}.bias", f"{self.layout.down}.weight")

    @override
    def apply_to(self, tensors: BlockTensors) -> None:
        scale_rows(tensors, self.layout.up, 1 / self.scale)
        scale_columns(tensors, self.layout.down, self.scale)

    @override
    @torch.no_grad()
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        weight = tensors[f"{self.layout.down}.weight"].abs().amax(0)
        self.scale.copy_(initial_scale(inputs[self.layout.down].magnitude, weight, alpha))
