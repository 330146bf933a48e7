"""A Lightning trainer that fits given blocks, and resumes inside them.

Everything here that leans on Lightning's private names is in :meth:`BlockTrainer._fit_block`; ``lightning`` is pinned
to the minor release they were read in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.calibration.engine import Engine, hidden_state_count
from omniquant_pl.calibration.loop import Calibration
from omniquant_pl.calibration.resume import ResumeState
from omniquant_pl.data import CalibrationData
from omniquant_pl.hidden_states import BatchOrder, HiddenStateBatches, HiddenStatePair
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.checkpoints import load_latest
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer.run_trainer import RunTrainer, seed
from omniquant_pl.utils.signals import SignalHandler

__all__ = ["BlockTrainer"]


class BlockTrainer(RunTrainer):
    """Calibrates consecutive blocks in the current context; ``max_epochs`` counts the epochs of one block.

    Args:
        max_epochs: Epochs per block; 0 folds the initial factors.
        options: As :class:`RunTrainer`.

    Raises:
        ConfigurationError: If a setting cannot work; it names the setting.
    """

    def __init__(self, *, max_epochs: int = 20, **options: Any) -> None:
        super().__init__(max_epochs=max_epochs, **options)
        self._least_epochs = self.min_epochs
        self.signals = SignalHandler(self._agree)
        self.fingerprint = {}
        self.resumes = False
        self.first_epoch = 0
        self.input_seconds = 0.0
        self._resume: tuple[Path, dict[str, Any]] | None = None
        self._early_stopping: list[tuple[Callback, dict[str, Any]]] = []

    @property
    @override
    def received_sigterm(self) -> bool:
        """Never: Lightning would leave at once, the calibration obeys signals where nothing gets lost."""
        return False

    def _agree(self, number: int) -> int:
        return self.group.largest(number)

    def calibrate(
        self,
        model: OmniQuantModel,
        data: CalibrationData,
        samples: int,
        blocks: range,
        streams: HiddenStatePair,
        engine: Engine,
        state: ResumeState,
        checkpoint: Path | None = None,
        warm: Callable[[int], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Calibrate consecutive blocks in the run folder, and goes on where that was interrupted.

        Args:
            model: The model and its settings.
            data: Settings of batches.
            samples: How many there are, over all processes of the group.
            blocks: Which blocks.
            streams: Both streams in front of the first of them.
            engine: What :meth:`engine` returns.
            state: What counts as finished; see :meth:`resume_state`.
            checkpoint: State inside a block to go on from; ``None`` for the run folder's, if there is one.
            warm: Returns the factors that a block's start from; ``None`` for the model's own start.
        """
        if self.resumes:
            found = load_latest(checkpoint or self.run_folder.checkpoint, lambda content: "calibration" in content)
            self._resume = None if found is None else (found[0], found[1]["calibration"])
        order = BatchOrder(samples, seed(), data.shuffle)
        Calibration(model, blocks, streams, data.batch_size, order, engine, state, warm).run()

    def resume_state(self, folder: RunFolder, resumes: bool | None = None) -> ResumeState:
        """Return what has been finished in a run folder; ``resumes``: whether it counts, by default as in the run."""
        resumes = self.resumes if resumes is None else resumes
        return ResumeState(folder, self.fingerprint, resumes, self.forces_resume)

    def engine(
        self,
        model: OmniQuantModel,
        tokens: Tensor,
        micro_batch_size: int | None,
        segments: int = 1,
        in_turn: int = 1,
        shares: int | None = None,
    ) -> Engine:
        """Return what a calibration of the group's blocks needs of this trainer.

        Args:
            model: The model and its settings.
            tokens: All token ids.
            micro_batch_size: Samples that are computed at once; ``None`` for as many as there are.
            segments: Segments of the calibration.
            in_turn: How many of them a process calibrates one after the other.
            shares: Processes that share the samples of a block; ``None`` for those of the group.
        """
        room, group = self.room(model, self.run_folder.streams), self.group
        count = hidden_state_count(model.objective.window.blocks, segments, in_turn)
        samples = math.ceil(len(tokens) / (shares or group.size))
        numbers = samples * tokens.shape[1] * model.source.config.hidden_size
        return Engine(
            room.device,
            room.storage(count * numbers, model.activation_dtype, keeps=True),
            self.precision_plugin.forward_context,
            self._fit_block,
            self._steps,
            self.call_hook,
            self.signals.obey,
            group,
            micro_batch_size,
        )

    def _fit_block(self, block: BlockModule, batches: HiddenStateBatches) -> None:
        """Let Lightning fit one block, on the trainer that has fitted those before it."""
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
        # It also keeps what EarlyStopping has seen: a later block would stop by the losses of an earlier one.
        for callback, state in self._early_stopping:
            callback.load_state_dict(copy.deepcopy(state))
        self._data_connector.attach_data(block, train_dataloaders=batches)
        self._run(block, ckpt_path=None if resume is None else resume[0])
        # Or Lightning would hold on to the optimizer's state and the block's streams until the next one comes.
        self.strategy.optimizers, self.strategy.lr_scheduler_configs = [], []
        self.fit_loop._combined_loader = None
        self.fit_loop._data_source.instance = None

    def _steps(self, batches: int) -> int:
        """Optimizer steps of a block, for so many batches an epoch."""
        limit = self.limit_train_batches
        used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return self.epochs_per_block * math.ceil(used / self.accumulate_grad_batches)
