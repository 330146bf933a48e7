"""Statistics of activations over all processes of a group, as one process would have seen them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from omniquant_pl.distributed.group import Group
from omniquant_pl.quant import ChannelRange, InputMoment, InputSample

__all__ = ["add_moments", "join_ranges", "join_samples"]


def join_ranges(
    ranges: Mapping[str, ChannelRange], columns: Mapping[str, int], device: torch.device, group: Group
) -> dict[str, ChannelRange]:
    """Return the input ranges over all processes.

    Args:
        ranges: Those of this process; a linear that none of its tokens has reached is absent.
        columns: Input channels of every linear, in the same order in all processes.
        device: Where the ranges are.
        group: The processes.
    """
    if group.size == 1:
        return dict(ranges)
    nothing = {name: torch.full((count,), math.inf, device=device) for name, count in columns.items()}
    lows = [ranges[name].low if name in ranges else nothing[name] for name in columns]
    highs = [ranges[name].high if name in ranges else -nothing[name] for name in columns]
    low, high = group.minimum(torch.cat(lows)), group.maximum(torch.cat(highs))
    counts = list(columns.values())
    joined = zip(columns, low.split(counts), high.split(counts), strict=True)
    return {name: ChannelRange(low, high) for name, low, high in joined if bool((low <= high).all())}


def add_moments(
    moments: Mapping[str, InputMoment], columns: Mapping[str, int], device: torch.device, group: Group
) -> dict[str, InputMoment]:
    """Return the second moments over all processes; arguments as of :func:`join_ranges`."""
    if group.size == 1:
        return dict(moments)
    found = {name: moments.get(name) or InputMoment(count, device) for name, count in columns.items()}
    tokens = group.total(moment.tokens for moment in found.values())
    for moment, count in zip(found.values(), tokens, strict=True):
        moment.tokens = int(count)
        group.sum(moment.second)
    return {name: moment for name, moment in found.items() if moment.tokens > 0}


def join_samples(samples: Mapping[str, InputSample], group: Group) -> dict[str, Tensor]:
    """Return the sampled tokens ``[at most size, in]`` of every linear over all processes."""
    return {name: _joined(sample, group) for name, sample in samples.items()}


def _joined(sample: InputSample, group: Group) -> Tensor:
    if group.size == 1:
        return sample.rows
    rows = group.concatenate(sample.rows)
    drawn, places = group.concatenate(sample.drawn), group.concatenate(sample.places)
    largest = drawn.topk(min(sample.size, len(drawn))).indices
    chosen = largest[places[largest].argsort()]
    return rows[chosen.to(rows.device)]
