"""A Lightning trainer that fits one block after the other.

It replaces ``Trainer._fit_impl``, a private name; ``lightning`` is pinned to the minor release it was read in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from typing_extensions import override

from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.data import CalibrationData
from omniquant_pl.distributed import (
    BlockParallelStrategy,
    GroupStrategy,
    HeartbeatMonitor,
    check_agreement,
    check_shared_folder,
)
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.hidden_states import HiddenStatePair
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.fingerprint import fingerprint
from omniquant_pl.run.settings import TRAINER_DEFAULTS, defaults_of, without_defaults
from omniquant_pl.trainer.block_parallel import SegmentedCalibration, segment_settings
from omniquant_pl.trainer.block_trainer import BlockTrainer
from omniquant_pl.trainer.checks import (
    check_compile,
    check_folding,
    check_segments,
    check_settings,
    check_shares,
    warn_of_slow_products,
)
from omniquant_pl.trainer.run_trainer import seed
from omniquant_pl.utils.signals import is_requeued

__all__ = ["SequentialTrainer"]


class SequentialTrainer(BlockTrainer):
    """Calibrates the blocks of a model in order; ``max_epochs`` counts the epochs of one block.

    Args:
        max_epochs: Epochs per block; 0 folds the initial factors.
        options: As :class:`RunTrainer`.

    Raises:
        ConfigurationError: If a setting cannot work; it names the setting.
    """

    @override
    def _fit_impl(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        assert isinstance(model, OmniQuantModel)
        assert isinstance(datamodule, CalibrationData)
        check_folding(self.calibration_callbacks)
        self.strategy.setup_environment()
        with HeartbeatMonitor(self.group.rank, self.group.size).watching(), self.signals.listening():
            with self.group.together():
                checkpoint = self._checkpoint_of(ckpt_path)
                warn_of_slow_products(self.precision, self.strategy.root_device)
                tokens = self.prepare(model, datamodule)
                data_group = self.strategy.mesh.data if isinstance(self.strategy, GroupStrategy) else self.group
                check_compile(model, datamodule, self.strategy.root_device, data_group)
                self._check_shares(model, datamodule, len(tokens))
                self.fingerprint = fingerprint(self._settings(model, datamodule), model.source.folder, tokens)
                self.call_hook(CalibrationCallback.on_ready, model)
            check_agreement(self.fingerprint, self.group)
            with self._locked():
                self._calibrate(model, datamodule, tokens, checkpoint)
            self.group.barrier()  # whoever has nothing left to do keeps what the others meet at
        self.training = False

    def _checkpoint_of(self, ckpt_path: Any) -> Path:
        """Decide whether an earlier run is gone on with, and from which checkpoint inside a block."""
        self.resumes = ckpt_path is not None or is_requeued()
        if ckpt_path in (None, "last"):
            return self.run_folder.checkpoint
        path = Path(ckpt_path)
        if isinstance(self.strategy, BlockParallelStrategy):
            raise ConfigurationError("ckpt_path", f"{path}: every segment has a checkpoint of its own; say last")
        if not path.is_file():
            message = f"{path} is not a file; last goes on from where the run in {self.run_folder.path} was interrupted"
            raise ConfigurationError("ckpt_path", message)
        return path

    def _check_shares(self, model: OmniQuantModel, data: CalibrationData, samples: int) -> None:
        if not isinstance(self.strategy, GroupStrategy):
            return
        check_shares(data, samples, self.strategy.mesh.data)
        check_settings(model, self.strategy.mesh.data)
        if isinstance(self.strategy, BlockParallelStrategy):
            check_segments(self.strategy, model, samples)

    @property
    def _segment_settings(self) -> dict[str, Any]:
        """What decides of a block-parallel calibration beyond the configuration."""
        strategy = self.strategy
        return segment_settings(strategy) if isinstance(strategy, BlockParallelStrategy) else {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other jobs out of the run folder, which all processes must see."""
        with ExitStack() as stack:
            with self.group.together():
                if self.is_global_zero:
                    stack.enter_context(self.run_folder.locked())
            check_shared_folder(self.run_folder.path, self.group)
            yield

    def _calibrate(self, model: OmniQuantModel, datamodule: CalibrationData, tokens: Tensor, checkpoint: Path) -> None:
        with self.group.together():
            self.resume_state(self.run_folder).check_same_calibration(len(model.source), checkpoint)
            for folder in self.run_folder.segment_folders():
                self.resume_state(folder).check_same_calibration(len(model.source), folder.checkpoint)
        if self.is_global_zero:
            self.run_folder.keep_log() if self.resumes else self.run_folder.start()
        self.group.barrier()
        self.call_hook(CalibrationCallback.on_calibration_start, model)
        self.call_hook(CalibrationCallback.on_baseline, model)
        self._early_stopping = [(c, c.state_dict()) for c in self.early_stopping_callbacks]
        with self.signals.deferred(), self.signals.explaining():
            if isinstance(self.strategy, BlockParallelStrategy):
                SegmentedCalibration(self, self.strategy, model, datamodule, tokens).run()
            else:
                self._calibrate_all(model, datamodule, tokens, checkpoint)
        self.call_hook(CalibrationCallback.on_calibration_end, model)
        if self.is_global_zero:
            self.run_folder.remove_checkpoints()

    def _calibrate_all(
        self, model: OmniQuantModel, datamodule: CalibrationData, tokens: Tensor, checkpoint: Path
    ) -> None:
        """Calibrate all blocks in order; the streams are gone when it returns, before anything is evaluated."""
        engine = self.engine(model, tokens, datamodule.micro_batch_size)
        streams = HiddenStatePair(engine.embed(model.source, self.group.share(tokens)))
        blocks, state = range(len(model.source)), self.resume_state(self.run_folder)
        self.calibrate(model, datamodule, len(tokens), blocks, streams, engine, state, checkpoint)

    def _settings(self, model: OmniQuantModel, data: CalibrationData) -> dict[str, Any]:
        """Return what decides what is learned, but for model files and tokens; no setting at its default."""
        counted = {"max_epochs": self.epochs_per_block, "min_epochs": self._least_epochs}  # Lightning counts all blocks
        trainer = {name: getattr(self, name) for name in TRAINER_DEFAULTS} | counted
        batches = {name: getattr(data, name) for name in ("batch_size", "shuffle", "micro_batch_size")}
        return {
            "model": without_defaults(model.settings, defaults_of(OmniQuantModel)),
            "data": without_defaults(batches, defaults_of(CalibrationData)),
            "trainer": without_defaults(trainer, TRAINER_DEFAULTS),
            "seed": seed(),
            **self._segment_settings,
        }
