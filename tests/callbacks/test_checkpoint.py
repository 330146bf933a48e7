"""When checkpoints are written, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.callbacks import CheckpointCallback
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer

Fit = Callable[..., SequentialTrainer]


class Clock:
    """Time that passes with the steps of a calibration, and while a checkpoint is written."""

    def __init__(self, seconds_of_a_step: float, seconds_of_a_checkpoint: float) -> None:
        self.now = 0.0
        self.saved: list[float] = []
        self._step = seconds_of_a_step
        self._checkpoint = seconds_of_a_checkpoint

    def step(self) -> None:
        self.now += self._step

    def save(self, *_: Any, **__: Any) -> None:
        self.saved.append(self.now)
        self.now += self._checkpoint


@pytest.fixture
def saved(llama: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Seconds at which checkpoints are written in 4 epochs of 6 steps, of one block after another."""

    def saved(clock: Clock, **options: Any) -> list[float]:
        class Steps(CalibrationCallback):
            def on_train_batch_start(self, *_: Any) -> None:
                clock.step()

        monkeypatch.setattr("omniquant_pl.callbacks.checkpoint.time.monotonic", lambda: clock.now)
        monkeypatch.setattr(SequentialTrainer, "save_checkpoint", clock.save)
        fit(OmniQuantModel(str(llama)), [Steps(), CheckpointCallback(**options)], max_epochs=4)
        return clock.saved

    return saved


def test_by_steps_but_never_at_the_end_of_an_epoch(saved: Callable[..., list[float]]) -> None:
    assert saved(Clock(1.0, 0.0), every_n_steps=4, every_minutes=None) == [
        *(4.0, 8.0, 13.0, 17.0, 21.0),  # the twelfth step ends an epoch: the next one does it
        *(28.0, 32.0, 37.0, 41.0, 45.0),
    ]


def test_by_minutes(saved: Callable[..., list[float]]) -> None:
    assert saved(Clock(30.0, 0.0), every_minutes=2.0) == [
        120.0,
        240.0,
        390.0,
        510.0,
        630.0,
        840.0,
        960.0,
        1110.0,
        1230.0,
        1350.0,
    ]


def test_less_often_where_writing_takes_long(saved: Callable[..., list[float]]) -> None:
    """6 seconds of writing are 3 % of 200."""
    first, second, *_ = saved(Clock(30.0, 6.0), every_minutes=2.0)
    assert first == 120.0
    assert 200 <= second - first - 6 <= 200 + 2 * 30


def test_not_at_all(saved: Callable[..., list[float]]) -> None:
    assert saved(Clock(1000.0, 0.0), every_minutes=None) == []


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_minutes": 0}, {"every_minutes": -1.0}])
def test_values_that_make_no_sense(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ConfigurationError, match=f"^checkpoint.{key}: "):
        CheckpointCallback(**options)
