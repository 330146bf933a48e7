"""The learnable equivalent transformation: what all pairs of operators have in common.

A pair joins an operator to those that consume its output. A channel scale ``s`` moves between the two so that their
product stays what it was: ``X' = X / s`` and ``W' = W diag(s)``.

Pairs work on *tensors*: a dictionary of a block's weights by dotted name, whose entries they replace. The same code
serves learning (the entries carry gradients), folding and the proof that nothing changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniquant_pl.quant import ChannelRange

__all__ = ["AttentionShape", "BlockTensors", "Pair", "initial_scale", "scale_columns", "scale_rows"]

BlockTensors = MutableMapping[str, Tensor]
"""Weights and biases of one block by dotted name, for example ``self_attn.q_proj.weight``."""

_SMALLEST_SCALE = 1e-2
"""What |scale| is kept above after every step, as the original does."""


@dataclass(frozen=True)
class AttentionShape:
    """Heads of an attention module.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads; ``heads`` is a multiple of it.
        head_dim: Channels of one head.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def spread(self, per_kv_channel: Tensor) -> Tensor:
        """Repeats ``[kv_heads * head_dim]`` over the query heads that share them, to ``[heads * head_dim]``."""
        grouped = per_kv_channel.view(self.kv_heads, 1, self.head_dim)
        return grouped.expand(-1, self.heads // self.kv_heads, -1).reshape(-1)

    def gather(self, per_channel: Tensor) -> Tensor:
        """Takes the largest over the query heads of a kv head: ``[heads * head_dim]`` to ``[kv_heads * head_dim]``."""
        return per_channel.view(self.kv_heads, -1, self.head_dim).amax(1).reshape(-1)


class Pair(nn.Module, ABC):
    """One learnable scale between an operator and its consumers.

    Args:
        channels: Length of the learned scale.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    @abstractmethod
    def apply_to(self, tensors: BlockTensors) -> None:
        """Replaces the entries that this pair transforms by their transformed values."""

    @abstractmethod
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        """Sets the starting point from the calibration set.

        Args:
            tensors: The block's original weights.
            inputs: Input range of every linear of the block in full precision.
            alpha: Migration strength.
        """

    @property
    @abstractmethod
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that :meth:`apply_to` replaces."""

    @torch.no_grad()
    def project(self) -> None:
        """Keeps the magnitude of the scale away from zero, its sign as it is."""
        floor = torch.where(self.scale < 0, -_SMALLEST_SCALE, _SMALLEST_SCALE)
        self.scale.copy_(torch.where(self.scale.abs() < _SMALLEST_SCALE, floor, self.scale))


def initial_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Returns ``max|X|^alpha / max|W|^(1 - alpha)``, at least 1e-5 (SmoothQuant, arXiv 2211.10438, equation 4).

    Args:
        activation: Largest magnitude per channel ``[channels]``.
        weight: Largest magnitude per input channel ``[channels]`` over all consumers.
        alpha: Migration strength.
    """
    activation, weight = activation.clamp(min=1e-5), weight.clamp(min=1e-5)
    return (activation.pow(alpha) / weight.pow(1 - alpha)).clamp(min=1e-5)


def scale_columns(tensors: BlockTensors, linear: str, scale: Tensor) -> None:
    """Multiplies the input channels of a linear's weight by ``scale [in]``."""
    tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scale


def scale_rows(tensors: BlockTensors, linear: str, scale: Tensor) -> None:
    """Multiplies the output channels of a linear, bias included, by ``scale [out]``."""
    tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scale[:, None]
    if f"{linear}.bias" in tensors:
        tensors[f"{linear}.bias"] = tensors[f"{linear}.bias"] * scale
