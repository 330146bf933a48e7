"""Contiguous segments: all blocks, in order, and no costlier than need be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniquant_pl.distributed import balanced_segments
from omniquant_pl.errors import ConfigurationError


def least_cost(costs: list[int], count: int) -> int:
    """By trying all borders."""
    borders = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), count - 1))
    return min(max(sum(costs[a:b]) for a, b in pairwise(each)) for each in borders)


@given(st.data())
def test_the_costliest_segment_costs_least(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    count = data.draw(st.integers(1, len(costs)))
    segments = balanced_segments(costs, count)
    assert len(segments) == count
    assert [index for segment in segments for index in segment] == list(range(len(costs)))
    assert max(sum(costs[index] for index in segment) for segment in segments) == least_cost(costs, count)


@pytest.mark.parametrize("count", [0, 4])
def test_a_segment_without_a_block_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match=r"trainer\.strategy\.segments"):
        balanced_segments([1, 1, 1], count)
