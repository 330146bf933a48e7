"""Keeps the factors with the least loss instead of the last ones."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.hidden_states import HiddenStateBatches

__all__ = ["KeepBestState"]


class KeepBestState(CalibrationCallback):
    """Measures the loss of the factors as they start and after every epoch, and ends a fit with the best.

    The mean loss that a step sees is that of factors on the move; here they stand still, so each epoch costs another
    forward pass over the calibration set. Add it to ``trainer.callbacks``.
    """

    def __init__(self) -> None:
        self._least = math.inf
        self._best: dict[str, Any] = {}
        self._is_resumed = False

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint of a block keeps."""
        return {"least": self._least, "best": self._best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._least, self._best, self._is_resumed = state_dict["least"], state_dict["best"], True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_resumed:
            self._is_resumed = False
            return
        self._least, self._best = math.inf, copy.deepcopy(pl_module.state_dict())
        self._compare(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(self._best)
        self._best = {}

    def _compare(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, BlockModule)
        with ExitStack() as stack:
            stack.enter_context(trainer.precision_plugin.forward_context())
            for block in module.blocks:
                stack.enter_context(cast(QuantizedBlock, block).held())
            batches: HiddenStateBatches = trainer.train_dataloader  # type: ignore[assignment]
            losses = [module.total_loss(batch) for batch in batches]
        loss = float(trainer.strategy.reduce(torch.stack(losses).sum(), reduce_op="sum"))
        if loss < self._least:
            self._best = {}  # two copies at once would be large where rounding is learned
            self._least, self._best = loss, copy.deepcopy(module.state_dict())
