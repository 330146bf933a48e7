"""A Lightning trainer that works on a run: its folder, its data, the callbacks that hear of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor
from typing_extensions import override

from omniquant_pl.calibration.hooks import CalibrationTrainer
from omniquant_pl.data import CalibrationData, TextSettings
from omniquant_pl.distributed import Group, GroupStrategy
from omniquant_pl.evaluate import Evaluation
from omniquant_pl.hidden_states import MemoryBudget
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.checkpoints import GuardedCheckpointIO
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer.checks import check_options, check_trainer, chosen_strategy
from omniquant_pl.trainer.devices import check_devices, lightning_refusal

__all__ = ["FitContext", "RunTrainer", "bind", "seed"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitContext:
    """What differs between the fit of a whole model and that of one of its segments."""

    folder: RunFolder
    """Where factors, checkpoints and logs go."""
    epochs: int
    """Epochs that a block learns."""


class RunTrainer(CalibrationTrainer):
    """What every command on a run needs.

    Args:
        logger: Loggers of the loss; ``None`` or true writes ``logs/metrics.csv`` in the run folder.
        max_epochs: Epochs per block; 0 folds the initial factors.
        options: As :class:`lightning.pytorch.Trainer`.

    Attributes:
        settings: The configuration, or what a command needs of it; the command line sets it.

    Raises:
        ConfigurationError: If a setting cannot work; it names the setting.
    """

    def __init__(
        self,
        *,
        logger: Logger | list[Logger] | bool | None = None,
        max_epochs: int = 20,
        **options: Any,
    ) -> None:
        root = Path(options.get("default_root_dir") or "runs/default")
        options["default_root_dir"] = str(root)
        options["plugins"] = [*_listed(options.get("plugins")), GuardedCheckpointIO()]
        if logger is None or logger is True:
            logger = _logger_in(root)
        check_options(max_epochs, root, options)
        check_devices(options)
        options["strategy"] = chosen_strategy(options)
        try:
            super().__init__(logger=logger, max_epochs=max_epochs, **options)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            raise lightning_refusal(error, options) from error
        check_trainer(self)
        self._contexts = [FitContext(RunFolder(root), max_epochs)]
        self.evaluation_tokens: dict[str, Tensor] = {}
        self.settings: Mapping[str, Any] = {}

    @property
    def context(self) -> FitContext:
        """Where the current blocks are written to, and how long they learn: the run's own, or a segment's."""
        return self._contexts[-1]

    @property
    @override
    def run_folder(self) -> RunFolder:
        return self.context.folder

    @property
    @override
    def epochs_per_block(self) -> int:
        return self.context.epochs

    @contextmanager
    def inside(self, context: FitContext) -> Iterator[None]:
        """Calibrate in another context for a while; loggers, if there are any, write into its folder."""
        loggers = self.loggers
        self._contexts.append(context)
        if loggers:
            self.loggers = [_logger_in(context.folder.path)]
        try:
            yield
        finally:
            self._contexts.pop()
            self.loggers = loggers

    def prepare(self, model: OmniQuantModel, data: CalibrationData) -> Tensor:
        """Open model and data and refuse what cannot work, before any work.

        Returns:
            Calibration token ids ``[samples, tokens]``.

        Raises:
            ConfigurationError: If model or data cannot be used; it names the setting.
        """
        bind(data, model)
        self.evaluation_tokens = data.evaluation_tokens()
        tokens = data.calibration_tokens()
        complaint = model.source.found_tokenizer.complaint
        if complaint is not None and self.global_rank == 0:
            _log.warning("%s; token ids do not need it", complaint)
        if self.global_rank == 0:  # it reads all there is
            model.verify()
        return tokens

    @override
    def evaluation(self, model: OmniQuantModel) -> Evaluation:
        """Return what measures the perplexities of the run; :meth:`prepare` comes first."""
        # Apart from a calibration's files: a run that is measured may be going on.
        room, context = self.room(model, self.run_folder.streams / "evaluation"), self.precision_plugin.forward_context
        return Evaluation(model, self.run_folder, self.evaluation_tokens, room, context, self.group)

    def room(self, model: OmniQuantModel, folder: Path) -> MemoryBudget:
        """Return what this process may take for hidden states, with files in a folder of the group's."""
        if self.group.size > 1:
            folder = folder / f"{self.group.rank:05d}-of-{self.group.size:05d}"
        return MemoryBudget(self.strategy.root_device, folder, model.activation_budget, self.num_devices)

    @property
    def group(self) -> Group:
        """The processes that work on the same thing as this one."""
        return self.strategy.group if isinstance(self.strategy, GroupStrategy) else Group()


def _logger_in(folder: Path) -> CSVLogger:
    """Return the logger that writes ``logs/metrics.csv``."""
    return CSVLogger(folder, name="logs", version="")


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, list | tuple) else [plugins]


def bind(data: CalibrationData, model: OmniQuantModel) -> None:
    """Tell the data for which model they are."""
    source = model.source
    found = source.found_tokenizer
    size = int(source.config.vocab_size)
    data.bind(TextSettings(found.tokenizer, source.positions, size, seed(), found.complaint))


def seed() -> int:
    """Return the seed that Lightning was given, or the published one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "2"))
