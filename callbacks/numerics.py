"""What happens when a loss or a gradient is not finite: back, slower, and stop if that does not help."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.errors import CalibrationError, ConfigurationError

__all__ = ["NumericsGuard"]

_log = logging.getLogger(__name__)


class NumericsGuard(CalibrationCallback):
    """Watches gradients, and takes an epoch back in which one was not finite.

    Which gradients were finite is recorded on the device and read once an epoch, so that no step waits for it. A bad
    epoch is taken back whole: factors and optimizer return to its start, the learning rates are halved, and it runs
    again.

    Args:
        retries: Bad epochs of one block that are taken back before the calibration stops.
    """

    def __init__(self, retries: int = 3) -> None:
        if retries < 0:
            raise ConfigurationError("numerics.retries", f"{retries} is below 0")
        self.retries = retries
        self._failures = 0
        self._good: tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]] = ({}, {}, [])
        self._parameters: dict[str, nn.Parameter] = {}
        self._no_gradient = torch.zeros(())
        self._first_bad: Tensor | None = None
        self._step = 0
        self._strict: list[EarlyStopping] = []
        self._resumed: dict[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint of a block keeps."""
        return {
            "failures": self._failures,
            "good": list(self._good),
            "first_bad": self._first_bad,
            "step": self._step,
            "strict": len(self._strict),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._resumed = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is None:
            return
        state, self._resumed = self._resumed, None
        self._failures, self._step = state["failures"], state["step"]
        factors, optimizer_state, schedules = state["good"]
        self._good = (factors, optimizer_state, schedules)
        self._watch(pl_module)
        self._first_bad = None if state["first_bad"] is None else state["first_bad"].to(pl_module.device)
        self._strict = [each for each in trainer.early_stopping_callbacks if each.strict][: state["strict"]]
        for stopping in self._strict:
            stopping.strict = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._failures = 0

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._good, self._parameters = ({}, {}, []), {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        self._good = ({}, {}, [])  # two copies at once would be large where rounding is learned
        self._good = copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict(), schedules))
        self._watch(pl_module)
        self._first_bad = None
        self._step = 0
        for stopping in self._strict:
            stopping.strict = True
        self._strict = []

    def _watch(self, module: LightningModule) -> None:
        self._parameters = dict(module.named_parameters())
        self._no_gradient = torch.zeros((), device=module.device)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Which parameters have one may differ from step to step: a batch need not reach every expert.
        gradients = [self._no_gradient if p.grad is None else p.grad for p in self._parameters.values()]
        bad = ~torch.isfinite(torch.stack(torch._foreach_norm(gradients)))
        if self._first_bad is None:
            self._first_bad = torch.full(bad.shape, -1, device=bad.device)
        self._first_bad = torch.where((self._first_bad < 0) & bad, self._step, self._first_bad)
        self._step += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first_bad is None:
            return
        steps: list[int] = self._first_bad.tolist()
        bad = [(step, name) for step, name in zip(steps, self._parameters, strict=True) if step >= 0]
        if not bad:
            return
        assert isinstance(pl_module, BlockModule)
        step, name = min(bad)
        where = f"block {pl_module.index}, epoch {len(pl_module.epoch_losses)}, step {step}: gradient of {name}"
        self._failures += 1
        if self._failures > self.retries:
            raise CalibrationError(
                f"{where} is not finite, {self.retries} retries at half the learning rate each did not help; "
                "lower model.clipping.lr and model.transform.lr, or use trainer.precision 32-true"
            )
        self._take_back(trainer, pl_module)
        _log.warning("%s is not finite; the epoch is repeated at half the learning rate", where)

    def _take_back(self, trainer: Trainer, block: BlockModule) -> None:
        factors, optimizer_state, schedules = self._good
        block.load_state_dict(factors)
        block.forget_epoch()
        trainer.optimizers[0].load_state_dict(optimizer_state)
        for group in trainer.optimizers[0].param_groups:  # its rates are those that the epoch began with
            group["lr"] /= 2
        for config, state in zip(trainer.lr_scheduler_configs, schedules, strict=True):
            bases = [rate / 2 for rate in config.scheduler.base_lrs]
            config.scheduler.load_state_dict(state)
            config.scheduler.base_lrs = bases
        loop = trainer.fit_loop
        assert loop.max_epochs is not None
        assert loop.min_epochs is not None
        loop.max_epochs, loop.min_epochs = loop.max_epochs + 1, loop.min_epochs + 1
        # The epoch has no loss. EarlyStopping, which comes next, would count the last one again, or miss it.
        trainer.callback_metrics.pop("loss", None)
        self._strict = [stopping for stopping in trainer.early_stopping_callbacks if stopping.strict]
        for stopping in self._strict:
            stopping.strict = False
