"""Trainer settings that make no sense block by block, refused by their keys."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from omniquant_pl.blocks.compiled import check_compiler
from omniquant_pl.calibration.hooks import CalibrationCallback, FoldingCallback
from omniquant_pl.data import CalibrationData
from omniquant_pl.distributed import (
    BlockParallelStrategy,
    DataParallelStrategy,
    Group,
    GroupStrategy,
    balanced_segments,
)
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import PRECISIONS

__all__ = [
    "check_compile",
    "check_folding",
    "check_options",
    "check_segments",
    "check_settings",
    "check_shares",
    "check_trainer",
    "chosen_strategy",
    "require_single_process",
    "warn_of_slow_products",
]

_log = logging.getLogger(__name__)

_STRATEGIES = ("single_device", "block_parallel")


def check_options(max_epochs: int, root: Path, options: Mapping[str, Any]) -> None:
    """Refuse what makes no sense block by block, before Lightning looks at it."""
    if options.get("max_time") is not None:
        raise ConfigurationError("trainer.max_time", "time is not counted across blocks; use trainer.max_epochs")
    if options.get("fast_dev_run"):
        raise ConfigurationError("trainer.fast_dev_run", "use data.samples and trainer.max_epochs for a short run")
    if max_epochs < 0:
        raise ConfigurationError("trainer.max_epochs", f"{max_epochs} is below 0")
    if options.get("accumulate_grad_batches", 1) < 1:
        message = f"{options['accumulate_grad_batches']} is not a positive number; 1 accumulates nothing"
        raise ConfigurationError("trainer.accumulate_grad_batches", message)
    if root.exists() and not root.is_dir():
        raise ConfigurationError("trainer.default_root_dir", f"{root} is not a folder")
    _check_precision(options.get("precision"))


def check_folding(callbacks: Sequence[CalibrationCallback]) -> None:
    """Refuse a fit whose blocks nobody would fold, before any block has learned for hours."""
    if not any(isinstance(callback, FoldingCallback) for callback in callbacks):
        message = "no callback folds the blocks; add omniquant_pl.callbacks.FoldCallback"
        raise ConfigurationError("trainer.callbacks", message)


def check_trainer(trainer: Trainer) -> None:
    """Refuse what Lightning accepts, once it has made sense of all options."""
    _check_precision(trainer.precision)  # a plugin may have set it
    if trainer.limit_train_batches == 0:
        raise ConfigurationError(
            "trainer.limit_train_batches", "0 learns nothing; for that set trainer.max_epochs to 0"
        )
    if trainer.max_steps != -1:
        raise ConfigurationError("trainer.max_steps", "steps are not counted across blocks; use trainer.max_epochs")
    if trainer.min_steps is not None:
        raise ConfigurationError("trainer.min_steps", "steps are not counted across blocks; use trainer.min_epochs")
    _check_world_size(trainer)


def _check_world_size(trainer: Trainer) -> None:
    """Of several processes that were launched each would take itself for the only one."""
    if isinstance(trainer.strategy, GroupStrategy):
        return
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        message = f"{trainer.num_devices} is not what was started, {started} processes in all; say how many a node has"
        raise ConfigurationError("trainer.devices", message)


def require_single_process(trainer: Trainer) -> None:
    """Refuse a launcher's processes for what one process does: each would do the same in the same folder."""
    strategy = trainer.strategy
    environment = strategy.cluster_environment if isinstance(strategy, GroupStrategy) else None
    if environment is not None and environment.creates_processes_externally and environment.world_size() > 1:
        message = f"only fit works in {environment.world_size()} processes; start one"
        raise ConfigurationError("trainer.devices", message)


def chosen_strategy(options: Mapping[str, Any]) -> Any:
    """Return the strategy that a setting stands for.

    Raises:
        ConfigurationError: If it is one that blocks cannot be calibrated with.
    """
    strategy = options.get("strategy", "auto")
    if strategy == "auto":
        is_alone = options.get("devices", 1) in (1, "1", [0]) and options.get("num_nodes", 1) == 1
        return "auto" if is_alone else DataParallelStrategy()
    if strategy == "ddp":
        return DataParallelStrategy()
    if strategy in _STRATEGIES or isinstance(strategy, GroupStrategy | SingleDeviceStrategy):
        return strategy
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    accepted = ", ".join(("auto", "ddp", *_STRATEGIES))
    raise ConfigurationError("trainer.strategy", f"blocks cannot be calibrated with {name}; accepted: {accepted}")


def check_shares(data: CalibrationData, samples: int, group: Group) -> None:
    """Refuse samples that cannot be shared out among processes.

    Args:
        data: Its settings.
        samples: How many there are.
        group: The processes that share every step.
    """
    if data.batch_size % group.size:
        message = (
            f"{data.batch_size} samples of a step cannot be shared out evenly among {group.size} processes; "
            f"it counts those of all processes together, so take a multiple of {group.size}"
        )
        raise ConfigurationError("data.batch_size", message)
    if samples < group.size:
        raise ConfigurationError("data.samples", f"{samples} is less than the {group.size} processes that share them")


def check_settings(model: OmniQuantModel, group: Group) -> None:
    """Refuse what processes that share the samples cannot do as one would."""
    has_experts = any(layout.experts is not None for layout in model.source.layouts)
    if group.size > 1 and has_experts and model.start.needs_samples:
        is_clipping = model.clipping is not None and model.clipping.search
        key, value = ("clipping.search", "false") if is_clipping else ("transform.initial", "smoothquant")
        message = (
            f"processes would sample other tokens of an expert than one does; set it to {value}, or take one process"
        )
        raise ConfigurationError(f"model.{key}", message)


def check_segments(strategy: BlockParallelStrategy, model: OmniQuantModel, samples: int) -> None:
    """Refuse what segments cannot be calibrated with."""
    size = strategy.mesh.world.size
    balanced_segments([1] * len(model.source), strategy.segment_count)  # refuses more than there are blocks
    if samples % size:
        message = f"{samples} samples cannot be shared out evenly among {size} processes; take a multiple of {size}"
        raise ConfigurationError("data.samples", message)
    if strategy.stitch_epochs and model.rounding.method == "learned":
        message = "rounding that has been learned is folded and cannot learn on; set it to nearest or gptq"
        raise ConfigurationError("model.rounding.method", f"{message}, or trainer.strategy.stitch_epochs to 0")
    if strategy.stitch_epochs and model.objective.window.blocks > 1:
        message = f"{model.objective.window.blocks} blocks at once cannot be stitched; set it to 1"
        raise ConfigurationError("model.objective.window.blocks", f"{message}, or trainer.strategy.stitch_epochs to 0")


def warn_of_slow_products(precision: str | int, device: torch.device) -> None:
    """Say that an x86 processor without AVX-512 multiplies bfloat16 far more slowly than float32."""
    if device.type != "cpu" or not str(precision).startswith("bf16") or platform.machine() not in ("x86_64", "AMD64"):
        return
    vectors = torch.backends.cpu.get_cpu_capability()
    if not vectors.startswith("AVX512"):
        message = "trainer.precision: this processor (%s) multiplies float32 faster than bfloat16; take 32-true here"
        _log.warning(message, vectors)


def check_compile(model: OmniQuantModel, data: CalibrationData, device: torch.device, group: Group) -> None:
    """Refuse compiled steps where they cannot work, or would be compiled over and over."""
    if not model.learning.compile:
        return
    check_compiler(device)
    if any(layout.experts is not None for layout in model.source.layouts):
        message = "experts get another number of tokens at every step, each of which would be compiled; say false"
        raise ConfigurationError("model.learning.compile", message)
    if group.size > 1 and data.shuffle and data.batch_size > 1 and data.micro_batch_size != 1:
        message = "shares of shuffled steps differ in size, each of which would be compiled; say false"
        raise ConfigurationError(
            "model.learning.compile", f"{message}, or data.shuffle false, or data.micro_batch_size 1"
        )


def _check_precision(precision: str | int | None) -> None:
    """Before Lightning replaces what the device does not have: 16-mixed would pass on a CPU."""
    if precision not in (None, 32, "32", "bf16", *PRECISIONS):
        raise ConfigurationError(
            "trainer.precision",
            f"{precision} would round the factors; accepted: {', '.join(PRECISIONS)}",
        )
