"""How far streams are from each other, over all processes that have a share of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import cast

from torch import Tensor

from omniquant_pl.distributed import Group
from omniquant_pl.hidden_states.states import HiddenStates
from omniquant_pl.utils.micro_batches import exact_dtype

__all__ = ["mean_square", "mean_squared_error"]


def mean_square(values: HiddenStates, group: Group) -> float:
    """Return the mean square over the shares of a group, a few samples at a time: no copy of the whole is made."""
    return _mean(map(_squares, values.parts()), values, group)


def mean_squared_error(output: HiddenStates, target: HiddenStates, group: Group) -> float:
    """Return the mean squared error likewise."""
    parts = zip(output.parts(), target.parts(), strict=True)
    return _mean((_squares(one - other) for one, other in parts), output, group)


def _squares(values: Tensor) -> list[float]:
    """Return the sum of squares of every sample."""
    return cast("list[float]", values.square().flatten(1).sum(1, dtype=exact_dtype(values.device)).tolist())


def _mean(sums: Iterable[list[float]], values: HiddenStates, group: Group) -> float:
    total, count = group.total((math.fsum(itertools.chain.from_iterable(sums)), values.shape.numel()))
    return total / count
