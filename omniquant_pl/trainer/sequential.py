"""A Lightning trainer that fits one block after the other.

Everything here that leans on Lightning's private names is in :meth:`SequentialTrainer._fit_impl` and
:meth:`SequentialTrainer._fit_block`; ``lightning`` is pinned to the minor release they were read in.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from typing_extensions import override

from omniquant_pl.activations import BatchOrder, Storage, StreamBatches, place_for
from omniquant_pl.block import BlockModule
from omniquant_pl.calibration import Calibration, Engine
from omniquant_pl.checkpoint.guarded import load_latest
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.fingerprint import fingerprint
from omniquant_pl.finished import FinishedBlocks
from omniquant_pl.interruption import Interruption, is_requeued
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer.comparing import compare_methods
from omniquant_pl.trainer.exporting import export_run
from omniquant_pl.trainer.generating import generate_text
from omniquant_pl.trainer.run import RunTrainer, seed
from omniquant_pl.trainer.testing import measure_run

__all__ = ["SequentialTrainer"]

_DECIDING = (
    "epochs_per_block",
    "min_epochs",
    "precision",
    "limit_train_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)


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
        self.epochs_per_block = max_epochs
        self.interruption = Interruption()
        self.fingerprint: dict[str, str] = {}
        self.resumes = False
        self.first_epoch = 0
        self._parts = 1
        self._resume: tuple[Path, dict[str, Any]] | None = None
        self._early_stopping: list[tuple[Callback, dict[str, Any]]] = []

    test = measure_run  # type: ignore[assignment]
    export = export_run
    generate = generate_text
    compare = compare_methods

    @property
    @override
    def received_sigterm(self) -> bool:
        """Never: Lightning would leave at once, the calibration obeys signals where nothing gets lost."""
        return False

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
        checkpoint = self._checkpoint_of(ckpt_path)
        with self.interruption.listening():
            tokens = self.prepare(model, datamodule)
            self.announce("on_ready", model)
            with self.run_folder.locked():
                self._calibrate(model, datamodule, tokens, checkpoint)
        self.training = False

    def _checkpoint_of(self, ckpt_path: Any) -> Path:
        """Decides whether an earlier run is gone on with, and from which checkpoint inside a block."""
        self.resumes = ckpt_path is not None or is_requeued()
        if ckpt_path in (None, "last"):
            return self.run_folder.checkpoint
        path = Path(ckpt_path)
        if not path.is_file():
            message = f"{path} is not a file; last goes on from where the run in {self.run_folder.path} was interrupted"
            raise ConfigurationError("ckpt_path", message)
        return path

    def _calibrate(self, model: OmniQuantModel, datamodule: CalibrationData, tokens: Tensor, checkpoint: Path) -> None:
        self.fingerprint = fingerprint(self._settings(model, datamodule), model.source.folder, tokens)
        force = any(getattr(callback, "force", False) for callback in self.calibration_callbacks)
        finished = FinishedBlocks(self.run_folder, self.fingerprint, self.resumes, force)
        finished.refuse_other(len(model.source), checkpoint)
        if self.resumes:
            self.run_folder.keep_log()
            found = load_latest(checkpoint, lambda content: "calibration" in content)
            self._resume = None if found is None else (found[0], found[1]["calibration"])
        elif self.is_global_zero:
            self.run_folder.start()
        self.announce("on_calibration_start", model)
        self.announce("on_baseline", model)
        self._early_stopping = [(c, c.state_dict()) for c in self.early_stopping_callbacks]
        order = BatchOrder(len(tokens), seed(), datamodule.shuffle)
        engine = Engine(
            self.strategy.root_device,
            self._storage(model, tokens),
            self.precision_plugin.forward_context,
            self._fit_block,
            self.announce,
            self.interruption.obey,
        )
        with self.interruption.deferred():
            Calibration(model, tokens, datamodule.batch_size, order, engine, finished).run()
        self.announce("on_calibration_end", model)
        if self.is_global_zero:
            self.run_folder.remove_checkpoints()

    def _settings(self, model: OmniQuantModel, data: CalibrationData) -> dict[str, Any]:
        """Everything that decides what is learned, but for the model files and the tokens."""
        own = {name: getattr(self, name) for name in _DECIDING}
        return model.settings | own | {"batch_size": data.batch_size, "shuffle": data.shuffle, "seed": seed()}

    def _storage(self, model: OmniQuantModel, tokens: Tensor) -> Storage:
        """Where the streams are kept: two in front of a block, two behind it, and the targets of its window."""
        device, dtype = self.strategy.root_device, model.activation_dtype
        count = 4 + model.window.blocks
        size = tokens.numel() * model.source.config.hidden_size * dtype.itemsize
        return Storage(place_for(count * size, model.activation_budget, device), dtype, device, self.run_folder.streams)

    def _fit_block(self, block: BlockModule, batches: StreamBatches) -> None:
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
        batches.sampler.start_block(self.first_epoch)
        block.steps = self._steps(len(batches))
        # It also keeps what EarlyStopping has seen: a later block would stop by the losses of an earlier one.
        for callback, state in self._early_stopping:
            callback.load_state_dict(copy.deepcopy(state))
        self._data_connector.attach_data(block, train_dataloaders=batches)
        block.parts = self._parts
        self._run(block, ckpt_path=None if resume is None else resume[0])
        self._parts = block.parts
        # Or Lightning would hold on to the optimizer's state and the block's streams until the next one comes.
        self.strategy.optimizers, self.strategy.lr_scheduler_configs = [], []
        self.fit_loop._combined_loader = None
        self.fit_loop._data_source.instance = None

    def _steps(self, batches: int) -> int:
        """Optimizer steps of a block, for so many batches an epoch."""
        limit = self.limit_train_batches
        used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return self.epochs_per_block * math.ceil(used / self.accumulate_grad_batches)
