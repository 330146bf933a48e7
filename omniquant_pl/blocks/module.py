"""Blocks as a LightningModule whose only parameters are the learned factors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from omniquant_pl.blocks.compiled import compiled, differing_kinds
from omniquant_pl.blocks.objective import mean_divergence
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.distributed import Group, add_gradients
from omniquant_pl.errors import CalibrationError, unmasked
from omniquant_pl.spec import FactorRates
from omniquant_pl.utils.memory import make_room
from omniquant_pl.utils.micro_batches import exact_dtype, gradients_by_micro_batch, split_batch, with_gradients

__all__ = ["BlockModule"]

_Gradients: TypeAlias = tuple[Tensor, list[Tensor | None]]
"""A loss, and its gradients by parameter."""

_log = logging.getLogger(__name__)


class BlockModule(LightningModule):
    """Learns the factors of a block, or of a window of consecutive blocks, against the full-precision output.

    Its loss is ``MSE(blocks_fp(X_fp), blocks_q(X_q))``, and with a second target in the batch that of
    ``blocks_fp(X_q)`` is added (``aug_loss``).

    Args:
        blocks: The blocks in order.
        rates: Learning rates, and how they change.
        head: What makes logits of the last block's output. With it the loss is not the squared error but the
            Kullback-Leibler divergence of the predicted tokens, ``KL(p_fp || p_q)``, mean over tokens.
        steps: Optimizer steps that the schedule is spread over.
        micro_batch_size: Samples computed at once; ``None`` for all of a batch.
        sums_exactly: Whether gradients are added up in float64, so that their order makes no difference.
        group: The processes that have the other samples of a batch; ``None`` for this one alone.
        samples_of: Returns how many samples a batch has in all processes, by its position; ``None`` if there is one.

    Attributes:
        micro_batch_size: As given; it falls if the samples do not fit into memory.
        epoch_losses: Mean loss of each epoch.
    """

    def __init__(
        self,
        blocks: Sequence[QuantizedBlock],
        rates: FactorRates,
        head: Callable[[Tensor], Tensor] | None = None,
        *,
        steps: int = 0,
        micro_batch_size: int | None = None,
        sums_exactly: bool = False,
        group: Group | None = None,
        samples_of: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__()
        self._head = head
        self.blocks = nn.ModuleList(blocks)
        self.rates = rates
        self.micro_batch_size = micro_batch_size
        self._steps = steps
        self._sums_exactly = sums_exactly
        self._group = group or Group()
        self._samples_of = samples_of
        self._is_compiled = rates.learning.compile
        self._checked: set[int] = set()
        self._batch: Sequence[Tensor] = ()
        self.epoch_losses: list[float] = []
        self._loss_sum = self._resumed_sum = torch.zeros(())
        self._loss_count = 0

    @property
    @unmasked
    def index(self) -> int:
        """Position of the first block in the model."""
        return self._blocks[0].index

    @property
    @unmasked
    def _blocks(self) -> list[QuantizedBlock]:
        return cast("list[QuantizedBlock]", list(self.blocks))

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Run the quantized blocks on ``[batch, tokens, channels]``."""
        run = compiled(QuantizedBlock.forward) if self._is_compiled else QuantizedBlock.__call__
        for block in self._blocks:
            hidden = run(block, hidden)
        return hidden

    @override
    def on_fit_start(self) -> None:
        for block in self._blocks:
            block.start_learning()
        self._loss_sum = self._resumed_sum.to(self.device)

    @override
    def on_fit_end(self) -> None:
        self._batch = ()
        for parameter in self.parameters():
            parameter.grad = None
        for block in self._blocks:
            block.end_learning()

    def release(self) -> None:
        """Let go of the blocks and the batches: Lightning holds on to a module until it gets the next one."""
        self.blocks = nn.ModuleList()
        self._head = self._samples_of = None

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch: quantized-stream input and one or two targets ``[batch, tokens, channels]``.

        The batch is this process's share, which may be empty; loss and gradients are those of the whole. They are
        computed here, not where Lightning asks for gradients: it would hold on to what did not fit.
        """
        self._loss_count += 1
        self._batch = batch
        samples = len(batch[0]) if self._samples_of is None else self._samples_of(batch_idx)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        own = self._gradients_that_fit(parameters, samples)
        loss, gradients = add_gradients(*own, parameters, self._group)
        self._loss_sum += loss
        return with_gradients(loss, gradients, parameters)

    def _gradients_that_fit(self, parameters: Sequence[nn.Parameter], samples: int) -> _Gradients:
        """Return this share's loss and gradients, from smaller micro-batches as long as memory runs out.

        Raises:
            CalibrationError: If a single sample does not fit.
        """
        while True:
            try:
                self._check_compiled(parameters)
                return self._gradients(parameters, samples)
            except torch.OutOfMemoryError as error:
                message = str(error)
            self._shrink_micro_batch(message)  # outside of the handler, which would hold on to what did not fit

    def _check_compiled(self, parameters: Sequence[nn.Parameter]) -> None:
        """Compare the first compiled gradients with plain ones, and goes on without compiling if they differ.

        Compilers have errors, and a wrong gradient would only be seen in the perplexity. Every size of a batch has
        compiled code of its own.
        """
        if not self._is_compiled:
            return
        sizes = {len(part[0]) for part in split_batch(self._batch, self.micro_batch_size)}
        if sizes <= self._checked:
            return
        kinds = [name.rpartition(".")[2] for name, parameter in self.named_parameters() if parameter.requires_grad]
        self._is_compiled = False
        try:
            _, plain = self._gradients(parameters)
        finally:
            self._is_compiled = True
        try:
            _, found = self._gradients(parameters)
            reason = "gives other gradients" if differing_kinds(plain, found, kinds) else None
        except (TorchDynamoException, torch.OutOfMemoryError) as error:
            reason = f"does not work ({str(error).strip().splitlines()[0]})"
        self._checked |= sizes
        if reason is not None:
            self._is_compiled = False
            _log.warning("block %d: torch.compile %s; the block learns by plain steps", self.index, reason)

    def _gradients(self, parameters: Sequence[nn.Parameter], samples: int | None = None) -> _Gradients:
        dtype = exact_dtype(self._batch[0].device) if self._sums_exactly else torch.float32
        return gradients_by_micro_batch(self.loss, self._batch, parameters, self.micro_batch_size, samples, dtype)

    def _shrink_micro_batch(self, message: str) -> None:
        tried = min(len(self._batch[0]), self.micro_batch_size or len(self._batch[0]))
        if tried == 1:
            raise CalibrationError(
                f"block {self.index}: one sample does not fit into memory; lower data.sequence_length or "
                f"model.objective.window.blocks ({message.splitlines()[0]})"
            )
        self.micro_batch_size = math.ceil(tried / 2)
        make_room()
        text = "block %d: %d samples do not fit into memory at once; it goes on with at most %d"
        _log.warning(text, self.index, tried, self.micro_batch_size)

    @torch.no_grad()
    def total_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the sum of the losses of a batch's samples in float64, as few at once as a step takes.

        Its steps are plain ones: compiled ones are only trusted where they have been compared.
        """
        was_compiled, self._is_compiled = self._is_compiled, False
        try:
            losses = [self.loss(part) * len(part[0]) for part in split_batch(batch, self.micro_batch_size)]
        finally:
            self._is_compiled = was_compiled
        found = torch.stack(losses) if losses else torch.zeros(0, device=batch[0].device)
        return found.sum(dtype=exact_dtype(found.device))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the loss of a batch, as :meth:`training_step` gets it."""
        hidden, *targets = batch
        output = self(hidden).float()
        return torch.stack([self._loss(output, target) for target in targets]).sum()

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self._head is None:
            return F.mse_loss(output, target)
        return mean_divergence(self._head, output, target)

    @override
    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        for block in self._blocks:
            block.factors.project()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch"] = {
            "losses": list(self.epoch_losses),
            "loss_sum": self._loss_sum.cpu(),
            "loss_count": self._loss_count,
        }
        checkpoint["compiled"] = self._is_compiled

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        epoch = checkpoint["epoch"]
        self.epoch_losses = list(epoch["losses"])
        self._resumed_sum, self._loss_count = epoch["loss_sum"], epoch["loss_count"]
        self._is_compiled = checkpoint.get("compiled", self._is_compiled)

    def forget_epoch(self) -> None:
        """Drop the losses of the current epoch, which has been taken back."""
        self._loss_sum.zero_()
        self._loss_count = 0

    @override
    def on_train_epoch_end(self) -> None:
        if self._loss_count == 0:
            return
        mean = float(self._loss_sum) / self._loss_count
        self.epoch_losses.append(mean)
        self.log("loss", mean)
        self.log("block", float(self.index))
        self.forget_epoch()

    @override
    def configure_optimizers(self) -> Any:
        """AdamW with a group for each kind of factors, and the schedule, if any."""
        rates, factors = self.rates, [block.factors for block in self._blocks]
        quantizers = [quantizer for each in factors for _, quantizer in each.named_quantizers()]
        clipping = [end for each in quantizers for end in (each.upper, each.lower) if end is not None]
        rounding = [each.offset for each in quantizers if each.offset is not None]
        transform = [parameter for each in factors for parameter in each.pairs.parameters()]
        groups = [
            {"params": clipping, "lr": rates.clipping, "name": "clipping"},
            {"params": transform, "lr": rates.transform, "name": "transform"},
            {"params": rounding, "lr": rates.rounding, "name": "rounding"},
        ]
        # Lightning cannot clip gradients under mixed precision for an optimizer that is fused.
        clips = self._trainer is not None and self._trainer.gradient_clip_val is not None
        used = [group for group in groups if group["params"]]
        optimizer = AdamW(used, weight_decay=rates.learning.weight_decay, fused=not clips)
        if rates.learning.schedule.is_constant:
            return optimizer
        scheduler = LambdaLR(optimizer, lambda step: rates.learning.schedule.factor(step, self._steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
