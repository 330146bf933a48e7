"""Keeps the state of the block that is learning, so that an interrupted calibration goes on where it was."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.calibration.hooks import CalibrationCallback, CalibrationTrainer, calibration_trainer
from omniquant_pl.errors import ConfigurationError

__all__ = ["CheckpointCallback"]


_LARGEST_SHARE = 0.03
"""Of the time that may go into checkpoints that the clock decides on."""


class CheckpointCallback(CalibrationCallback):
    """Writes ``last.ckpt`` inside a block: factors, optimizer, position in the data, random numbers.

    Finished blocks do not need it. Go on with --ckpt_path last.

    Args:
        every_n_steps: Steps between checkpoints; null: only the time decides.
        every_minutes: Minutes between checkpoints, more where writing one takes over 3 % of them; null: only the steps
            decide.
        force: Go on although settings, model files or tokens are not those that the run began with.
    """

    def __init__(
        self, every_n_steps: int | None = None, every_minutes: float | None = 5.0, force: bool = False
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError("checkpoint.every_n_steps", f"{every_n_steps} is not a positive number of steps")
        if every_minutes is not None and not every_minutes > 0:
            raise ConfigurationError("checkpoint.every_minutes", f"{every_minutes} is not a positive number of minutes")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._force = force
        self._steps = 0
        self._saved_at = self._seconds = 0.0
        self._random: dict[str, Any] | None = None

    @property
    @override
    def forces_resume(self) -> bool:
        return self._force

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self._saved_at = 0, time.monotonic()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random is not None:  # an epoch's start is not heard of in the middle of one
            _set_random_state(self._random)
            self._random = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer = calibration_trainer(trainer)
        self._steps += not trainer.fit_loop._should_accumulate()
        # Gradients of half a step are in no checkpoint, and Lightning would take the end of an epoch for done.
        if trainer.fit_loop._should_accumulate() or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        is_wanted = trainer.signals.is_requested or self._is_due()
        if trainer.strategy.reduce_boolean_decision(is_wanted, all=False):
            self._save(trainer)
            trainer.signals.obey()

    def _save(self, trainer: CalibrationTrainer) -> None:
        started = time.monotonic()
        trainer.save_checkpoint(trainer.run_folder.checkpoint)
        self._steps, self._saved_at = 0, time.monotonic()
        self._seconds = self._saved_at - started

    def _is_due(self) -> bool:
        if self.every_n_steps is not None and self._steps >= self.every_n_steps:
            return True
        if self.every_minutes is None:
            return False
        return time.monotonic() - self._saved_at >= max(60 * self.every_minutes, self._seconds / _LARGEST_SHARE)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        trainer = calibration_trainer(trainer)
        assert isinstance(pl_module, BlockModule)
        checkpoint["calibration"] = {
            "fingerprint": dict(trainer.fingerprint),
            "first": pl_module.index,
            "first_epoch": trainer.first_epoch,
            "max_epochs": trainer.fit_loop.max_epochs,
        }
        checkpoint["random"] = _random_state()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint["random"]


def _random_state() -> dict[str, Any]:
    """Return the generators' states, as what a checkpoint may hold: tensors, numbers, texts."""
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
