"""Keeps ``report.html`` up to date while a run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback, CalibrationTrainer, calibration_trainer
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange
from omniquant_pl.report import Record, block_statistics, write_report
from omniquant_pl.utils.memory import peak_memory

__all__ = ["ReportCallback"]

_log = logging.getLogger(__name__)

_LARGEST_SHARE = 0.01
"""Of the time that may go into reports before the last one."""


class ReportCallback(CalibrationCallback):
    """Writes ``report.html`` into the run folder, after blocks and at the end; it can be opened while the run goes on.

    Args:
        enabled: Write it.
        every_seconds: Least seconds between two of them, more where writing one takes over 1 % of the time.
    """

    def __init__(self, enabled: bool = True, every_seconds: float = 30.0) -> None:
        if not every_seconds >= 0:
            raise ConfigurationError("report.every_seconds", f"{every_seconds} is not a number of seconds from 0 on")
        self.enabled = enabled
        self.every_seconds = every_seconds
        self._blocks = 0
        self._inputs: dict[int, Mapping[str, ChannelRange]] = {}
        self._losses: dict[int, list[float]] = {}
        self._written_at = self._seconds = 0.0

    @override
    def on_calibration_start(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._blocks = len(model.source)
        self._written_at = time.monotonic()

    @override
    def on_inputs_observed(self, trainer: CalibrationTrainer, index: int, inputs: Mapping[str, ChannelRange]) -> None:
        self._inputs[index] = inputs

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BlockModule)
        self._losses[pl_module.index] = list(pl_module.epoch_losses)

    @override
    def on_block_trained(self, trainer: CalibrationTrainer, block: QuantizedBlock) -> None:
        """Comes before the block's factors are written: a block that counts as finished has its statistics."""
        inputs, losses = self._inputs.pop(block.index), self._losses.pop(block.index, [])
        if self.enabled and trainer.is_global_zero:
            with _at_no_cost(f"what the report says of block {block.index}"):
                memory = peak_memory(trainer.strategy.root_device)
                Record.keep(trainer.run_folder, block_statistics(block.index, block.factors, inputs, losses, memory))

    @override
    def on_block_end(self, trainer: CalibrationTrainer, block: QuantizedBlock, result: BlockResult) -> None:
        if time.monotonic() - self._written_at >= max(self.every_seconds, self._seconds / _LARGEST_SHARE):
            self._write(trainer)

    @override
    def on_calibration_end(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        trainer = calibration_trainer(trainer)
        if not (self.enabled and trainer.is_global_zero):
            return
        started = time.monotonic()
        with _at_no_cost(str(trainer.run_folder.report)):
            write_report(trainer.run_folder, self._blocks, refresh_seconds=60)
        self._written_at = time.monotonic()
        self._seconds = self._written_at - started


@contextmanager
def _at_no_cost(what: str) -> Iterator[None]:
    """Warn of what could not be written: a picture must not cost a calibration."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        _log.warning("%s could not be written: %s: %s", what, type(error).__name__, error)
