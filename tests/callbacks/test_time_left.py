"""The time left, against runs whose blocks and evaluations take known times."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from omniquant_pl.callbacks.time_left import TimeLeft, last_block_cost
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ObjectiveSpec


@pytest.mark.parametrize("last", [1.0, 10.0])
@pytest.mark.parametrize("evaluations", [0, 3])
def test_it_is_what_a_regular_run_takes(last: float, evaluations: int) -> None:
    block, evaluation, count = 7.0, 20.0, 12
    truth = [block] * (count - 1) + [block * last]
    left = TimeLeft(count, last, evaluations)
    if evaluations:
        left.evaluation_done(evaluation)
    assert left.seconds is None  # nothing is known of a block
    for number, seconds in enumerate(truth, 1):
        left.block_done(seconds)
        expected = sum(truth[number:]) + evaluation * max(0, evaluations - 1)
        if number < count:
            assert left.seconds == pytest.approx(expected)
    for done in range(2, evaluations + 1):
        left.evaluation_done(evaluation)
        assert (left.seconds or 0) < evaluation * (evaluations - done) + 1e-9 + evaluation * (evaluations > done)


def test_blocks_that_an_earlier_process_has_finished_take_no_time() -> None:
    left = TimeLeft(10)
    for _ in range(6):
        left.block_done(None)
    assert left.seconds is None
    left.block_done(5.0)
    assert left.seconds == pytest.approx(15.0)


def test_blocks_that_are_stitched_count() -> None:
    left = TimeLeft(2)
    left.block_done(4.0)
    left.add_blocks(1)
    assert left.seconds == pytest.approx(8.0)


def test_nothing_is_left() -> None:
    left = TimeLeft(1)
    left.block_done(4.0)
    assert left.seconds is None


def test_a_last_block_that_learns_predictions_takes_longer(llama: Path) -> None:
    assert last_block_cost(OmniQuantModel(str(llama))) == 1
    model = OmniQuantModel(str(llama), objective=ObjectiveSpec(output_loss="kl"))
    weights = 4 * 32 * 32 + 3 * 32 * 48  # of a block of hidden size 32 and intermediate size 48
    expected = 1 + 4 * 32 * 64 / (3 * weights)
    assert math.isclose(last_block_cost(model), expected)
