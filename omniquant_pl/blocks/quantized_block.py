"""One transformer block with its factors: fake-quantized while it learns, folded afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omniquant_pl.blocks.factors import BlockFactors, FoldedBlock
from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.errors import CalibrationError, unmasked
from omniquant_pl.nn import QuantLinear
from omniquant_pl.quant import InputMoment, QuantizedWeight, activation_quantizer, observe_moments
from omniquant_pl.spec import ActivationSpec

__all__ = ["QuantizedBlock"]


class QuantizedBlock(nn.Module):
    """Runs a block with what its factors make of its weights. Its parameters are the factors alone.

    Args:
        index: Position of the block in the model.
        network: The prepared block (:func:`omniquant_pl.nn.prepare_block`); it holds the original tensors.
        factors: The factors to learn.
        call: How the model calls the block.

    Attributes:
        loss_initial: Mean squared error against the target before learning; NaN until it is measured.
        epochs: Epochs learned.
    """

    def __init__(self, index: int, network: nn.Module, factors: BlockFactors, call: BlockCall) -> None:
        super().__init__()
        self.index = index
        self.network = network
        self.factors = factors
        self.call = call
        self.loss_initial = math.nan
        self.epochs = 0
        self.quantized: dict[str, QuantizedWeight] = {}
        self._originals: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    @property
    @unmasked
    def is_folded(self) -> bool:
        """Whether the network holds the final weights."""
        return bool(self.quantized)

    @property
    @unmasked
    def device(self) -> torch.device:
        """Where the block's tensors are."""
        return next(iter(self.tensors.values())).device

    @property
    @unmasked
    def tensors(self) -> dict[str, Tensor]:
        """The network's weights and biases by name: the originals, or the final ones once folded."""
        return {name: tensor for name, tensor in self.network.named_buffers() if tensor.is_floating_point()}

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the quantized block on ``[batch, tokens, channels]``."""
        if self.is_folded:
            return self.call(self.network, hidden)
        overridden = self._held or self._overridden()

        def network(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            return cast(Tensor, functional_call(self.network, overridden, (hidden, *arguments), options))

        return self.call(cast(nn.Module, network), hidden)

    def _overridden(self) -> dict[str, Tensor]:
        """Return what the factors make of the tensors, in float32 whatever the precision of the passes.

        A shift in lower precision would move an output by other amounts than the bias makes up for.
        """
        with torch.autocast(self.device.type, enabled=False):
            return cast("dict[str, Tensor]", self.factors(self._originals or self.tensors))

    @contextmanager
    def held(self) -> Iterator[None]:
        """For passes without gradients: what the factors make of the tensors is computed once for all of them."""
        with torch.no_grad():
            self._held = self._overridden()
        try:
            yield
        finally:
            self._held = {}

    def start_learning(self) -> None:
        """Compute once, on the block's device, what stays the same over all steps."""
        self._originals = self.tensors
        self.factors.freeze_ranges(self._originals)

    def end_learning(self) -> None:
        """Forget what was kept for the steps: the block may move to another device."""
        self._originals = {}
        self.factors.release_ranges()

    def choose_codes(
        self,
        run: Callable[[], object],
        add: Callable[[Mapping[str, InputMoment]], Mapping[str, InputMoment]] = dict,
    ) -> None:
        """Choose the codes with error compensation (GPTQ) on the inputs that the quantized block's linears get.

        Args:
            run: Runs the block over the calibration set.
            add: Adds up what several processes have seen of it.
        """
        shared, quantize_input = self.factors.shared_inputs, activation_quantizer(self._activations)
        observed = observe_moments(self.network, sorted(set(shared.values())), quantize_input)
        with self.held(), observed as moments:
            run()
        total = add(moments)
        device = self.device
        self.to("cpu")
        seconds = {key: moment.second.cpu() for key, moment in total.items()}
        self.factors.choose_codes(self.tensors, {name: seconds[key] for name, key in shared.items() if key in seconds})
        self.to(device)

    @property
    @unmasked
    def _activations(self) -> ActivationSpec | None:
        linears = (module for module in self.network.modules() if isinstance(module, QuantLinear))
        return next(linears).activations

    def fold(self) -> FoldedBlock:
        """Put the final, dequantized weights into the network; computed on the CPU whatever the device.

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
