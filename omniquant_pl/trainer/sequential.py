"""A Lightning trainer that fits one block after the other.

Everything here that leans on Lightning's private names is in :meth:`SequentialTrainer._fit_impl` and
:meth:`SequentialTrainer._fit_block`; ``lightning`` is pinned to the minor release they were read in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.calibration.engine import Engine, hidden_state_count
from omniquant_pl.calibration.loop import Calibration
from omniquant_pl.calibration.resume import ResumeState
from omniquant_pl.data import CalibrationData
from omniquant_pl.distributed import (
    BlockParallelStrategy,
    GroupStrategy,
    HeartbeatMonitor,
    check_agreement,
    check_shared_folder,
)
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.hidden_states import BatchOrder, HiddenStateBatches, HiddenStatePair
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.checkpoints import load_latest
from omniquant_pl.run.fingerprint import fingerprint
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.run.settings import FINGERPRINTED_TRAINER_KEYS
from omniquant_pl.trainer.block_parallel import SegmentedCalibration, segment_settings
from omniquant_pl.trainer.checks import (
    check_compile,
    check_segments,
    check_settings,
    check_shares,
    warn_of_slow_products,
)
from omniquant_pl.trainer.run_trainer import RunTrainer, seed
from omniquant_pl.utils.signals import SignalHandler, is_requeued

__all__ = ["SequentialTrainer"]

_COUNTED = ("max_epochs", "min_epochs")
"""What Lightning counts over all blocks."""


class SequentialTrainer(RunTrainer):
    """Calibrates the blocks of a model in order; ``max_epochs`` counts the epochs of one block.

    Args:
        max_epochs: Epochs per block; 0 folds the initial factors.
        options: As :class:`RunTrainer`.

    Raises:
        ConfigurationError: If a setting cannot work; it names the setting.
    """

    def __init__(self, *, max_epochs: int = 20, **options: Any) -> None:
        super().__init__(max_epochs=max_epochs, **options)
        self.epochs_per_block, self._least_epochs = max_epochs, self.min_epochs
        self.interruption = SignalHandler(self._agree)
        self.fingerprint: dict[str, str] = {}
        self.resumes = False
        self.first_epoch = 0
        self.input_seconds = 0.0
        self._micro_batch_size: int | None = None
        self._resume: tuple[Path, dict[str, Any]] | None = None
        self._early_stopping: list[tuple[Callback, dict[str, Any]]] = []

    @property
    @override
    def received_sigterm(self) -> bool:
        """Never: Lightning would leave at once, the calibration obeys signals where nothing gets lost."""
        return False

    def _agree(self, number: int) -> int:
        return self.group.largest(number)

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
        self.strategy.setup_environment()
        with HeartbeatMonitor(self.group.rank, self.group.size).watching(), self.interruption.listening():
            with self.group.together():
                checkpoint = self._checkpoint_of(ckpt_path)
                warn_of_slow_products(self.precision, self.strategy.root_device)
                tokens = self.prepare(model, datamodule)
                data_group = self.strategy.mesh.data if isinstance(self.strategy, GroupStrategy) else self.group
                check_compile(model, datamodule, self.strategy.root_device, data_group)
                self._check_shares(model, datamodule, len(tokens))
                self.fingerprint = fingerprint(self._settings(model, datamodule), model.source.folder, tokens)
                self.call_hook("on_ready", model)
            check_agreement(self.fingerprint, self.group)
            with self._locked():
                self._calibrate(model, datamodule, tokens, checkpoint)
            self.group.barrier()  # whoever has nothing left to do keeps what the others meet at
        self.training = False

    def _checkpoint_of(self, ckpt_path: Any) -> Path:
        """Decides whether an earlier run is gone on with, and from which checkpoint inside a block."""
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
        """Keeps other jobs out of the run folder, which all processes must see."""
        with ExitStack() as stack:
            with self.group.together():
                if self.is_global_zero:
                    stack.enter_context(self.run_folder.locked())
            check_shared_folder(self.run_folder.path, self.group)
            yield

    def _calibrate(self, model: OmniQuantModel, datamodule: CalibrationData, tokens: Tensor, checkpoint: Path) -> None:
        with self.group.together():
            self.finished(self.run_folder).check_same_calibration(len(model.source), checkpoint)
            for folder in self.run_folder.segment_folders():
                self.finished(folder).check_same_calibration(len(model.source), folder.checkpoint)
        if self.is_global_zero:
            self.run_folder.keep_log() if self.resumes else self.run_folder.start()
        self.group.barrier()
        self.call_hook("on_calibration_start", model)
        self.call_hook("on_baseline", model)
        self._micro_batch_size = None
        self._early_stopping = [(c, c.state_dict()) for c in self.early_stopping_callbacks]
        with self.interruption.deferred(), self.interruption.explaining():
            if isinstance(self.strategy, BlockParallelStrategy):
                SegmentedCalibration(self, self.strategy, model, datamodule, tokens).run()
            else:
                self._calibrate_all(model, datamodule, tokens, checkpoint)
        self.call_hook("on_calibration_end", model)
        if self.is_global_zero:
            self.run_folder.remove_checkpoints()

    def _calibrate_all(
        self, model: OmniQuantModel, datamodule: CalibrationData, tokens: Tensor, checkpoint: Path
    ) -> None:
        """Calibrates all blocks in order; the streams are gone when it returns, before anything is evaluated."""
        engine = self.engine(model, tokens, datamodule.micro_batch_size)
        streams = HiddenStatePair(engine.embed(model.source, self.group.share(tokens)))
        blocks, finished = range(len(model.source)), self.finished(self.run_folder)
        self.calibrate(model, datamodule, len(tokens), blocks, streams, engine, finished, checkpoint)

    def _settings(self, model: OmniQuantModel, data: CalibrationData) -> dict[str, Any]:
        """Everything that decides what is learned, but for the model files and the tokens."""
        names = [name for name in FINGERPRINTED_TRAINER_KEYS if name not in _COUNTED]
        counted = {"epochs_per_block": self.epochs_per_block, "min_epochs": self._least_epochs}
        own = counted | {name: getattr(self, name) for name in names}
        given = {"batch_size": data.batch_size, "shuffle": data.shuffle, "seed": seed()}
        if data.micro_batch_size is not None:  # runs that do not know the option go on
            given["micro_batch_size"] = data.micro_batch_size
        return model.settings | own | given | self._segment_settings

    def calibrate(
        self,
        model: OmniQuantModel,
        data: CalibrationData,
        samples: int,
        blocks: range,
        streams: HiddenStatePair,
        engine: Engine,
        finished: ResumeState,
        checkpoint: Path | None = None,
        warm: Callable[[int], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Calibrates consecutive blocks in the run folder, and goes on where that was interrupted.

        Args:
            model: The model and its settings.
            data: Settings of batches.
            samples: How many there are, over all processes of the group.
            blocks: Which blocks.
            streams: Both streams in front of the first of them.
            engine: What :meth:`engine` returns.
            finished: What counts as finished; see :meth:`finished`.
            checkpoint: State inside a block to go on from; ``None`` for the run folder's, if there is one.
            warm: Returns the factors that a block's start from; ``None`` for the model's own start.
        """
        if self.resumes:
            found = load_latest(checkpoint or self.run_folder.checkpoint, lambda content: "calibration" in content)
            self._resume = None if found is None else (found[0], found[1]["calibration"])
        order = BatchOrder(samples, seed(), data.shuffle)
        Calibration(model, blocks, streams, data.batch_size, order, engine, finished, warm).run()

    def finished(self, folder: RunFolder, resumes: bool | None = None) -> ResumeState:
        """Returns what has been finished in a run folder; ``resumes``: whether it counts, by default as in the run."""
        force = any(getattr(callback, "force", False) for callback in self.calibration_callbacks)
        return ResumeState(folder, self.fingerprint, self.resumes if resumes is None else resumes, force)

    def engine(
        self,
        model: OmniQuantModel,
        tokens: Tensor,
        micro_batch_size: int | None,
        segments: int = 1,
        in_turn: int = 1,
        shares: int | None = None,
    ) -> Engine:
        """Returns what a calibration of the group's blocks needs of this trainer.

        Args:
            model: The model and its settings.
            tokens: All token ids.
            micro_batch_size: Samples that are computed at once; ``None`` for as many as there are.
            segments: Segments of the calibration.
            in_turn: How many of them a process calibrates one after the other.
            shares: Processes that share the samples of a block; ``None`` for those of the group.
        """
        room, group = self.room(model, self.run_folder.streams), self.group
        count = hidden_state_count(model.window.blocks, segments, in_turn)
        samples = math.ceil(len(tokens) / (shares or group.size))
        numbers = samples * tokens.shape[1] * model.source.config.hidden_size
        return Engine(
            room.device,
            room.storage(count * numbers, model.activation_dtype, keeps=True),
            self.precision_plugin.forward_context,
            self._fit_block,
            self.call_hook,
            self.interruption.obey,
            group,
            micro_batch_size,
        )

    def _fit_block(self, block: BlockModule, batches: HiddenStateBatches) -> None:
        """Lets Lightning fit one block, on the trainer that has fitted those before it."""
        if not list(block.parameters()):  # neither clipping nor transform: nothing to learn
            return
        self.training = True
        self.should_stop = False
        self.state.status = TrainerStatus.RUNNING
        resume, self._resume = self._resume, None
        if resume is not None and resume[1]["first"] != block.index:
            resume = None
        # Lightning counts epochs over the trainer's life and would run none for a second block.
        self.first_epoch = self.current_epoch
        self.fit_loop.max_epochs = self.first_epoch + self.epochs_per_block
        if resume is not None:
            self.first_epoch, self.fit_loop.max_epochs = resume[1]["first_epoch"], resume[1]["max_epochs"]
        repeated = self.fit_loop.max_epochs - self.first_epoch - self.epochs_per_block  # before an interruption
        self.fit_loop.min_epochs = self.first_epoch + repeated + (self._least_epochs or 0)
        batches.sampler.start_block(self.first_epoch)
        block.steps = self._steps(len(batches))
        # It also keeps what EarlyStopping has seen: a later block would stop by the losses of an earlier one.
        for callback, state in self._early_stopping:
            callback.load_state_dict(copy.deepcopy(state))
        self._data_connector.attach_data(block, train_dataloaders=batches)
        # Of an earlier block, as many may not have fitted into memory.
        block.micro_batch_size = min(
            (size for size in (block.micro_batch_size, self._micro_batch_size) if size is not None), default=None
        )
        self._run(block, ckpt_path=None if resume is None else resume[0])
        self._micro_batch_size = block.micro_batch_size
        # Or Lightning would hold on to the optimizer's state and the block's streams until the next one comes.
        self.strategy.optimizers, self.strategy.lr_scheduler_configs = [], []
        self.fit_loop._combined_loader = None
        self.fit_loop._data_source.instance = None

    def _steps(self, batches: int) -> int:
        """Optimizer steps of a block, for so many batches an epoch."""
        limit = self.limit_train_batches
        used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return self.epochs_per_block * math.ceil(used / self.accumulate_grad_batches)
