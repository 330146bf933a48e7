"""A calibration that ends in the middle, and what a run folder holds afterwards."""

from __future__ import annotations

from typing import Any

from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.run.folder import RunFolder


class PowerCutError(Exception):
    """The process is gone."""


class PowerCut(CalibrationCallback):
    """Ends everything at the n-th of the moments that a calibration can be interrupted at.

    Attributes:
        passed: Moments so far.
    """

    def __init__(self, moment: int) -> None:
        self._moment = moment
        self.passed = 0

    def _tick(self) -> None:
        self.passed += 1
        if self.passed > self._moment:
            raise PowerCutError

    def on_train_batch_start(self, *_: Any) -> None:
        self._tick()

    def on_train_batch_end(self, *_: Any) -> None:
        self._tick()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._tick()

    def on_block_start(self, *_: Any) -> None:
        self._tick()

    def on_block_trained(self, *_: Any) -> None:
        self._tick()

    def on_block_end(self, *_: Any) -> None:
        self._tick()

    def on_calibration_end(self, *_: Any) -> None:
        self._tick()


def blocks_of(run: RunFolder) -> dict[str, bytes]:
    """The files of the finished blocks."""
    return {path.name: path.read_bytes() for path in sorted(run.blocks.iterdir())}
