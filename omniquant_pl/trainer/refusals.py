"""Trainer settings that make no sense block by block, refused by their keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from omniquant_pl.errors import ConfigurationError

__all__ = ["refuse_options", "refuse_trainer"]

_PRECISIONS = ("32-true", "bf16-mixed")


def refuse_options(max_epochs: int, root: Path, options: Mapping[str, Any]) -> None:
    """Refuses what makes no sense block by block, before Lightning looks at it."""
    if options.get("max_time") is not None:
        raise ConfigurationError("trainer.max_time", "time is not counted across blocks; use trainer.max_epochs")
    if options.get("fast_dev_run"):
        raise ConfigurationError("trainer.fast_dev_run", "use data.samples and trainer.max_epochs for a short run")
    if max_epochs < 0:
        raise ConfigurationError("trainer.max_epochs", f"{max_epochs} is below 0")
    if root.exists() and not root.is_dir():
        raise ConfigurationError("trainer.default_root_dir", f"{root} is not a folder")
    _refuse_precision(options.get("precision"))


def refuse_trainer(trainer: Trainer) -> None:
    """Refuses what Lightning accepts, once it has made sense of all options."""
    _refuse_precision(trainer.precision)  # a plugin may have set it
    if trainer.limit_train_batches == 0:
        raise ConfigurationError(
            "trainer.limit_train_batches", "0 learns nothing; for that set trainer.max_epochs to 0"
        )
    if trainer.max_steps != -1:
        raise ConfigurationError("trainer.max_steps", "steps are not counted across blocks; use trainer.max_epochs")
    if trainer.num_nodes > 1:
        raise ConfigurationError("trainer.num_nodes", "blocks are calibrated on one device; set it to 1")
    # Launched as several processes with one device each, every one would take itself for the only one.
    if trainer.world_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("trainer.devices", "blocks are calibrated on one device; set it to 1")


def _refuse_precision(precision: str | int | None) -> None:
    """Before Lightning replaces what the device does not have: 16-mixed would pass on a CPU."""
    if precision not in (None, 32, "32", "bf16", *_PRECISIONS):
        raise ConfigurationError(
            "trainer.precision",
            f"{precision} would round the factors; accepted: {', '.join(_PRECISIONS)}",
        )
