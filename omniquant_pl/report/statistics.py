"""What the report shows of a block beyond its measurements: a few hundred numbers, kept in the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.quant import ChannelRange
from omniquant_pl.transform import Pair

__all__ = ["LEVELS", "BlockStatistics", "InputStatistics", "block_statistics"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles that a distribution is kept as."""

_PROFILE = 128
"""Most numbers that the channels of an input are kept as."""


@dataclass(frozen=True)
class InputStatistics:
    """Magnitudes of the channels that linears read: the largest over all calibration tokens, in full precision."""

    readers: list[str]
    """The linears, which read the same; experts stand together."""
    before: list[float]
    """Channels in their order as the model has them; the largest of several neighbours where there are many."""
    median_before: float
    """Of the median channel."""
    after: list[float] | None = None
    """The same channels behind the learned transformation; ``None`` where nothing transforms them."""
    median_after: float | None = None
    """Likewise."""


@dataclass(frozen=True)
class BlockStatistics:
    """One block, as it was folded."""

    index: int
    """Position in the model."""
    epoch_losses: list[float] = field(default_factory=list)
    """Mean loss of every epoch, of the window that begins with this block."""
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    """Most bytes that the process has used so far, of ``host`` and ``device``."""
    clipping: dict[str, list[float]] = field(default_factory=dict)
    """By linear, the :data:`LEVELS` of the share of its range that a row or group keeps, at both ends."""
    inputs: list[InputStatistics] = field(default_factory=list)
    """What the linears read."""

    @staticmethod
    def read(content: Mapping[str, Any]) -> BlockStatistics:
        """Take what :func:`dataclasses.asdict` has made of one.

        Raises:
            TypeError: If it is something else.
        """
        inputs = [InputStatistics(**each) for each in content.get("inputs", [])]
        return BlockStatistics(**{**content, "inputs": inputs})


@torch.no_grad()
def block_statistics(
    index: int,
    factors: BlockFactors,
    inputs: Mapping[str, ChannelRange],
    epoch_losses: list[float],
    peak_memory_bytes: dict[str, int],
) -> BlockStatistics:
    """Summarize a block that has learned.

    Args:
        index: Position of the block.
        factors: What it has learned.
        inputs: Input ranges of its linears in full precision.
        epoch_losses: Mean loss of every epoch.
        peak_memory_bytes: Most bytes in use so far.
    """
    return BlockStatistics(index, epoch_losses, peak_memory_bytes, _clipping(factors), _inputs(factors, inputs))


def _clipping(factors: BlockFactors) -> dict[str, list[float]]:
    shares: dict[str, list[Tensor]] = {}
    for name, quantizer in factors.named_quantizers():
        ends = [end for end in (quantizer.upper, quantizer.lower) if end is not None]
        shares.setdefault(_kind(name), []).extend(torch.sigmoid(end).flatten().cpu() for end in ends)
    return {kind: _levels(torch.cat(found)) for kind, found in shares.items() if found}


def _levels(values: Tensor) -> list[float]:
    return [float(value) for value in np.quantile(values.numpy(), LEVELS)]  # torch.quantile takes 16 million at most


def _inputs(factors: BlockFactors, inputs: Mapping[str, ChannelRange]) -> list[InputStatistics]:
    """One entry for all that read the same; of experts the largest magnitudes of each channel."""
    pairs = {name: pair for _, pair in factors.named_pairs() for name in pair.consumers}
    groups: dict[str, list[str]] = {}
    for name, representative in factors.shared_inputs.items():
        if name in inputs:
            groups.setdefault(_kind(representative), []).append(name)
    return [_input(names, inputs, pairs) for names in groups.values()]


def _input(names: list[str], inputs: Mapping[str, ChannelRange], pairs: Mapping[str, Pair]) -> InputStatistics:
    before = _largest(inputs[name].magnitude for name in names)
    readers = list(dict.fromkeys(map(_kind, names)))
    if any(name not in pairs for name in names):
        return InputStatistics(readers, _profile(before), float(before.median()))
    after = _largest(_transformed(inputs[name], pairs[name]) for name in names)
    return InputStatistics(readers, _profile(before), float(before.median()), _profile(after), float(after.median()))


def _transformed(values: ChannelRange, pair: Pair) -> Tensor:
    """Magnitudes ``[channels]`` of ``(x - shift) / scale``."""
    scale = pair.spread(pair.scale).to(values.low)
    shift = torch.zeros_like(scale) if pair.shift is None else pair.spread(pair.shift).to(values.low)
    return torch.maximum((values.low - shift).abs(), (values.high - shift).abs()) / scale.abs()


def _largest(magnitudes: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(magnitudes)).amax(0).cpu()


def _profile(magnitudes: Tensor) -> list[float]:
    return [float(part.max()) for part in magnitudes.tensor_split(min(_PROFILE, len(magnitudes)))]


def _kind(name: str) -> str:
    """Return the linear's name, with a star for the number of an expert."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
