"""The learnable equivalent transformation: what all pairs of operators have in common.

A pair joins an operator to those that consume its output. A channel scale ``s``, and between operators that have
biases a shift ``d``, move between the two so that their product stays what it was::

    X' = (X - d) / s        W' = W diag(s)        b' = b + W d

Pairs work on *tensors*: a dictionary of a block's weights by dotted name, whose entries they replace. The same code
serves learning (the entries carry gradients), folding and the proof that nothing changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from omniquant_pl.errors import unmasked
from omniquant_pl.quant import ChannelRange

__all__ = ["BlockTensors", "Pair", "add_shift", "initial_scale", "range_of", "scale_columns", "scale_rows"]

BlockTensors = MutableMapping[str, Tensor]
"""Weights and biases of one block by dotted name, for example ``self_attn.q_proj.weight``."""

_SMALLEST_SCALE = 1e-2
"""What |scale| is kept above after every step, as the original does."""


class Pair(nn.Module, ABC):
    """One learnable scale, and perhaps a shift, between an operator and its consumers.

    Args:
        channels: Length of the learned scale.
        shift: Length of the learned shift; ``None`` for no shift.
        positive: Whether the scale has to stay positive, because it moves through an activation function.
    """

    def __init__(self, channels: int, shift: int | None = None, positive: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = None if shift is None else nn.Parameter(torch.zeros(shift))
        self._positive = positive

    @abstractmethod
    def apply_to(self, tensors: BlockTensors) -> None:
        """Replace the entries that this pair transforms by their transformed values."""

    @abstractmethod
    def initialize(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange], alpha: float) -> None:
        """Set the starting point from the calibration set.

        Args:
            tensors: The block's original weights.
            inputs: Input range of the block's linears in full precision; of those that any token has reached.
            alpha: Migration strength.
        """

    @property
    @abstractmethod
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that :meth:`apply_to` replaces."""

    @property
    @unmasked
    def other_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that the scale may also have when it is loaded."""
        return ()

    @property
    @unmasked
    def consumers(self) -> tuple[str, ...]:
        """Names of the quantized linears that read the scaled output; empty where none does."""
        return ()

    def spread(self, values: Tensor) -> Tensor:
        """Repeat values ``[channels]``, such as the scale, to the input channels of the consumers."""
        return values

    def gather(self, per_channel: Tensor) -> Tensor:
        """Take the largest of the input channels of the consumers that share a scale: ``[channels]``."""
        return per_channel

    @torch.no_grad()
    def project(self) -> None:
        """Keep the magnitude of the scale away from zero, its sign as it is; or the scale positive."""
        if self._positive:
            self.scale.clamp_(min=_SMALLEST_SCALE)
            return
        floor = torch.where(self.scale < 0, -_SMALLEST_SCALE, _SMALLEST_SCALE)
        self.scale.copy_(torch.where(self.scale.abs() < _SMALLEST_SCALE, floor, self.scale))


def initial_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return ``max|X|^alpha / max|W|^(1 - alpha)``, at least 1e-5 (SmoothQuant, arXiv 2211.10438, equation 4).

    Args:
        activation: Largest magnitude per channel ``[channels]``.
        weight: Largest magnitude per input channel ``[channels]`` over all consumers.
        alpha: Migration strength.
    """
    activation, weight = activation.clamp(min=1e-5), weight.clamp(min=1e-5)
    return (activation.pow(alpha) / weight.pow(1 - alpha)).clamp(min=1e-5)


def range_of(inputs: Mapping[str, ChannelRange], linears: Iterable[str]) -> ChannelRange | None:
    """Return the range over everything that these linears have read, or ``None`` where no token reached any."""
    found = [inputs[name] for name in linears if name in inputs]
    if not found:
        return None
    low = torch.stack([channels.low for channels in found]).amin(0)
    return ChannelRange(low, torch.stack([channels.high for channels in found]).amax(0))


def scale_columns(tensors: BlockTensors, linear: str, scale: Tensor) -> None:
    """Multiply the input channels of a linear's weight by ``scale [in]``."""
    tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scale


def scale_rows(tensors: BlockTensors, linear: str, scale: Tensor, rows: Tensor | None = None) -> None:
    """Multiply output channels of a linear, bias included.

    Args:
        tensors: The block's tensors.
        linear: Dotted name of the linear.
        scale: Factors ``[out]``, or as many as there are rows.
        rows: Indices of the output channels; ``None`` for all.
    """
    weight = tensors[f"{linear}.weight"]
    if rows is not None:
        scale = torch.ones_like(weight[:, 0]).index_put((rows,), scale)
    tensors[f"{linear}.weight"] = weight * scale[:, None]
    if f"{linear}.bias" in tensors:
        tensors[f"{linear}.bias"] = tensors[f"{linear}.bias"] * scale


def add_shift(tensors: BlockTensors, linear: str, shift: Tensor) -> None:
    """Add to a linear's bias what it makes of an input shift ``[in]``: call it before its columns are scaled."""
    tensors[f"{linear}.bias"] = tensors[f"{linear}.bias"] + tensors[f"{linear}.weight"] @ shift
