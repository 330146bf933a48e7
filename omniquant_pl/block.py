"""One transformer block as a LightningModule whose only parameters are the learned factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import AdamW
from typing_extensions import override

from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.errors import CalibrationError
from omniquant_pl.factors import BlockFactors, FoldedBlock
from omniquant_pl.quant import QuantizedWeight

__all__ = ["BlockModule", "LearningRates"]


@dataclass(frozen=True)
class LearningRates:
    """AdamW learning rates of the two kinds of factors.

    Attributes:
        clipping: Of the clipping factors.
        transform: Of the scales.
    """

    clipping: float
    transform: float


class BlockModule(LightningModule):
    """Learns the factors of one block against the full-precision block's output.

    Its loss is ``MSE(block_fp(X_fp), block_q(X_q))``, and with a second target in the batch that of
    ``block_fp(X_q)`` is added (``aug_loss``).

    Args:
        index: Position of the block in the model.
        network: The prepared block (:func:`omniquant_pl.nn.prepare_block`); it holds the original tensors.
        factors: The factors to learn.
        call: How the model calls the block.
        rates: Learning rates.
    """

    def __init__(
        self,
        index: int,
        network: nn.Module,
        factors: BlockFactors,
        call: BlockCall,
        rates: LearningRates,
    ) -> None:
        super().__init__()
        self.index = index
        self.network = network
        self.factors = factors
        self.call = call
        self.rates = rates
        self.quantized: dict[str, QuantizedWeight] = {}
        self.epoch_losses: list[float] = []
        self._originals: dict[str, Tensor] = {}
        self._loss_sum = torch.zeros(())
        self._loss_count = 0

    @property
    def is_folded(self) -> bool:
        """Whether the network holds the final weights."""
        return bool(self.quantized)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The network's weights and biases by name: the originals, or the final ones once folded."""
        return {name: tensor for name, tensor in self.network.named_buffers() if tensor.is_floating_point()}

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Runs the quantized block on ``[batch, tokens, channels]``."""
        if self.is_folded:
            return self.call(self.network, hidden)
        overridden = self.factors(self._originals or self.tensors)

        def network(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            return cast(Tensor, functional_call(self.network, overridden, (hidden, *arguments), options))

        return self.call(cast(nn.Module, network), hidden)

    @override
    def on_fit_start(self) -> None:
        self._originals = self.tensors
        self.factors.freeze_ranges(self._originals)
        self._loss_sum = torch.zeros((), device=self.device)

    @override
    def on_fit_end(self) -> None:
        """The block is on the CPU again; what was kept for the steps is not."""
        self._originals = {}
        self.factors.release_ranges()

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a batch: quantized-stream input and one or two targets ``[batch, tokens, channels]``."""
        hidden, *targets = batch
        output = self(hidden).float()
        loss = torch.stack([F.mse_loss(output, target) for target in targets]).sum()
        self._loss_sum += loss.detach()
        self._loss_count += 1
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.factors.project()

    def forget_epoch(self) -> None:
        """Drops the losses of the current epoch, which has been taken back."""
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
    def configure_optimizers(self) -> AdamW:
        """AdamW without weight decay, one group for the clipping factors and one for the scales."""
        groups = [
            {
                "params": list(self.factors.quantizers.parameters()),
                "lr": self.rates.clipping,
                "name": "clipping",
            },
            {
                "params": list(self.factors.pairs.parameters()),
                "lr": self.rates.transform,
                "name": "transform",
            },
        ]
        # Lightning cannot clip gradients under mixed precision for an optimizer that is fused.
        clips = self._trainer is not None and self._trainer.gradient_clip_val is not None
        return AdamW([group for group in groups if group["params"]], weight_decay=0.0, fused=not clips)

    def fold(self) -> FoldedBlock:
        """Puts the final, dequantized weights into the network; computed on the CPU whatever the device.

        Returns:
            The folded block with its codes.

        Raises:
            CalibrationError: If a scale cannot be stored.
        """
        if self.is_folded:
            raise RuntimeError(f"block {self.index} is folded already")
        device = self.device
        self.to("cpu")
        try:
            folded = self.factors.fold(self.tensors)
        except CalibrationError as error:
            raise CalibrationError(f"block {self.index}, {error}") from error
        for name, tensor in folded.tensors.items():
            owner, _, leaf = name.rpartition(".")
            self.network.get_submodule(owner)._buffers[leaf] = tensor
        self.quantized = folded.quantized
        self.to(device)
        return folded
