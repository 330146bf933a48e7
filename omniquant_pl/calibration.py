"""The walk over the blocks: targets, learning, folding, both streams moved on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.activations import BatchOrder, StreamBatches, Streams, map_batches
from omniquant_pl.block import BlockModule
from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.errors import CalibrationError
from omniquant_pl.hooks import BlockResult
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange, observe_inputs

__all__ = ["Calibration", "Engine"]


class Engine:
    """What the calibration needs of the trainer.

    Args:
        device: Where blocks and streams live.
        context: Precision context of a forward pass.
        fit_block: Lets a block learn from batches.
        announce: Calls a hook of the callbacks with its arguments.
    """

    def __init__(
        self,
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
        fit_block: Callable[[BlockModule, StreamBatches], None],
        announce: Callable[..., None],
    ) -> None:
        self.device = device
        self.context = context
        self.fit_block = fit_block
        self.announce = announce

    def map(self, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Runs a block over a stream ``[samples, tokens, channels]`` without gradients; float32 comes back."""
        with self.context():
            return map_batches(lambda batch: function(batch).float(), hidden)


class Calibration:
    """Calibrates the blocks of a model one after the other.

    Args:
        model: The model and its settings.
        tokens: Calibration token ids ``[samples, tokens]``.
        batch_size: Samples of a step.
        order: Order of the samples.
        engine: The trainer's side.
    """

    def __init__(
        self,
        model: OmniQuantModel,
        tokens: Tensor,
        batch_size: int,
        order: BatchOrder,
        engine: Engine,
    ) -> None:
        self._model = model
        self._source = model.source
        self._batch_size = batch_size
        self._order = order
        self._engine = engine
        self._source.to(engine.device)
        self._calls = self._source.calls(tokens.shape[1])
        self._streams = Streams(map_batches(self._source.embed, tokens))

    def run(self) -> None:
        """Calibrates every block."""
        for index in range(len(self._source)):
            self._calibrate(index)

    def _calibrate(self, index: int) -> None:
        started = time.perf_counter()
        engine, hidden = self._engine, self._streams.quantized
        tensors = self._source.block_tensors(index)
        targets, inputs = self._targets(index, tensors)
        block = self._model.block(index, tensors, self._calls[index], inputs).to(engine.device)
        loss_initial = _mean_squared_error(engine.map(block, hidden), targets[0])
        engine.announce("on_block_start", block)
        engine.fit_block(block, StreamBatches((hidden, *targets), self._batch_size, self._order))
        engine.announce("on_block_trained", block)
        if not block.is_folded:
            raise CalibrationError("no callback folded the block; trainer.callbacks needs a FoldCallback")
        output = engine.map(block.to(engine.device), hidden)
        result = self._result(block, output, targets[0], tensors, loss_initial, started)
        self._streams.advance(targets[0], output)
        engine.announce("on_block_end", block, result)

    def _targets(self, index: int, tensors: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, ChannelRange]]:
        """Returns the targets and the full-precision input ranges of the block's linears."""
        call, streams = self._calls[index], self._streams
        block = self._source.make_block(index, tensors).to(self._engine.device)
        with observe_inputs(block, self._source.layout.linears) as inputs:
            target = self._engine.map(lambda hidden: call(block, hidden), streams.full_precision)
        ranges = {name: ChannelRange(found.low.cpu(), found.high.cpu()) for name, found in inputs.items()}
        if not self._model.aug_loss:
            return (target,), ranges
        if streams.are_equal:
            return (target, target), ranges
        return (
            target,
            self._engine.map(lambda hidden: call(block, hidden), streams.quantized),
        ), ranges

    def _result(
        self,
        block: BlockModule,
        output: Tensor,
        target: Tensor,
        tensors: dict[str, Tensor],
        loss_initial: float,
        started: float,
    ) -> BlockResult:
        call: BlockCall = self._calls[block.index]
        nearest = self._model.round_to_nearest(block.index, tensors, call).to(self._engine.device)
        power = _mean_square(target)
        loss = _mean_squared_error(output, target)
        nearest_loss = _mean_squared_error(self._engine.map(nearest, self._streams.quantized), target)
        return BlockResult(
            index=block.index,
            loss_initial=loss_initial,
            loss_final=loss,
            relative_error_rtn=nearest_loss / power,
            relative_error=loss / power,
            seconds=time.perf_counter() - started,
            epochs=len(block.epoch_losses),
        )


def _mean_square(values: Tensor) -> float:
    """Mean over ``[samples, ...]``, a few samples at a time: no copy of the whole stream is made."""
    return math.fsum(float(part.square().sum()) for part in values.split(8)) / values.numel()


def _mean_squared_error(output: Tensor, target: Tensor) -> float:
    parts = zip(output.split(8), target.split(8), strict=True)
    return math.fsum(float((one - other).square().sum()) for one, other in parts) / output.numel()
