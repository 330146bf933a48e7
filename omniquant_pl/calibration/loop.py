"""The walk over the blocks: targets, learning, folding, both streams moved on."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.engine import Engine
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback
from omniquant_pl.calibration.resume import ResumeState
from omniquant_pl.distributed import add_moments, check_equal_blocks, join_ranges, join_samples
from omniquant_pl.errors import CalibrationError
from omniquant_pl.families import BlockLayout
from omniquant_pl.hidden_states import (
    BatchOrder,
    HiddenStateBatches,
    HiddenStatePair,
    HiddenStates,
    PersistedHiddenStates,
    mean_square,
    mean_squared_error,
)
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import observe_inputs, observe_samples
from omniquant_pl.utils.memory import return_free_memory

__all__ = ["Calibration"]

_log = logging.getLogger(__name__)


class Calibration:
    """Calibrates consecutive blocks of a model one after the other.

    Args:
        model: The model and its settings.
        blocks: Which blocks; all of a model without cluster.
        streams: Both streams in front of the first of them.
        batch_size: Samples of a step, over all processes of the group.
        order: Order of the samples.
        engine: The trainer's side.
        finished: What was done before an interruption.
        warm: Returns the factors that a block's start from; ``None`` for the model's own start.
    """

    def __init__(
        self,
        model: OmniQuantModel,
        blocks: range,
        streams: HiddenStatePair,
        batch_size: int,
        order: BatchOrder,
        engine: Engine,
        finished: ResumeState,
        warm: Callable[[int], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._model = model
        self._warm = warm
        self._source = model.source
        self._blocks = blocks
        self._batch_size = batch_size
        self._order = order
        self._engine = engine
        self._finished = finished
        with self._source.on(engine.device):
            self._calls = self._source.calls(streams.quantized.shape[1])
        self._share = (engine.group.rank, engine.group.size)
        self._kept = PersistedHiddenStates(engine.storage, finished.fingerprint)
        self._streams = streams

    def run(self) -> None:
        """Calibrate the blocks: windows of them learn together, and each advance folds those left behind."""
        window, last = self._model.objective.window, self._blocks.stop
        pending: deque[_Pending] = deque()
        targets = self._streams.full_precision
        entered = self._blocks.start
        while entered < last or pending:
            if not pending:
                entered = self._pass_finished(entered)
                targets = self._streams.full_precision
                restore = self._finished.restore_window(entered, self._blocks, window)
            while entered < last and len(pending) < window.blocks:
                pending.append(self._enter(entered, targets))
                restore(pending[-1].block)
                targets = pending[-1].target
                entered += 1
            if pending:
                self._learn(list(pending))
                left = window.stride if entered < last else len(pending)
                if left < len(pending):
                    self._finished.save_window([entry.block for entry in list(pending)[left:]])
                for _ in range(left):
                    self._advance(pending.popleft())
                    return_free_memory()  # of the block that has gone
                self._engine.pause()
        self._kept.remove()

    def _pass_finished(self, index: int) -> int:
        """Move both streams behind the blocks that are finished already, and return the first that is not."""
        finished, group = self._finished, self._engine.group
        end = group.least(finished.first_unfinished(index, self._blocks, self._model.objective.window))
        needed = min((number for number in range(index, end) if finished.result(number) is None), default=end)
        needed = group.least(needed)
        if index < needed < self._blocks.stop:
            needed = self._restore_streams(index, needed)
        for number in range(index, end):
            result = finished.result(number)
            if result is None or number >= needed:
                result = self._restore(number, result)
            self._engine.call_hook(CalibrationCallback.on_block_restored, result)
            self._engine.pause()
        return end

    def _restore_streams(self, index: int, last: int) -> int:
        """Take over streams that are kept, at most those of a block, and return which block they are in front of."""
        kept = self._kept.restore(last)
        positions = set(self._engine.group.collect(index if kept is None else kept[0]))
        if kept is None or len(positions) > 1 or kept[0] <= index:
            return index
        position, streams = kept
        self._streams.advance(streams.full_precision, streams.quantized)  # whoever holds these gives the others up
        return position

    def _restore(self, index: int, result: BlockResult | None) -> BlockResult:
        """Move both streams behind a finished block, which is measured unless that has been written down."""
        engine, call, tensors = self._engine, self._calls[index], self._source.block_tensors(index)
        found = self._finished.load(index)
        assert found is not None
        factors, known = found
        original = self._source.make_block(index, tensors).to(engine.device)
        target = engine.map(partial(call, original), self._streams.full_precision)
        del original
        block = self._model.folded(index, tensors, call, factors).to(engine.device)
        block.loss_initial, block.epochs = known["loss_initial"], known["epochs"]
        hidden = self._streams.quantized
        output = engine.map(block, hidden)
        if result is None:
            result = self._measure(block, tensors, target, output, seconds=0.0)
        self._streams.advance(target, output)
        return result

    def _enter(self, index: int, hidden: HiddenStates) -> _Pending:
        """Prepare a block for learning, and compute its full-precision output for its full-precision input."""
        started = time.perf_counter()
        tensors = self._source.block_tensors(index)
        original = self._source.make_block(index, tensors).to(self._engine.device)
        call = self._calls[index]
        linears, group, device = self._source.layouts[index].linears, self._engine.group, self._engine.device
        sampled = linears if self._model.start.needs_samples else ()
        observed = observe_samples(original, sampled, share=self._share)
        with observe_inputs(original, linears) as ranges, observed as samples:
            target = self._engine.map(partial(call, original), hidden, splits=not sampled)
        del original
        inputs = join_ranges(ranges, {name: tensors[f"{name}.weight"].shape[1] for name in linears}, device, group)
        rows = join_samples(samples, group)
        self._engine.call_hook(CalibrationCallback.on_inputs_observed, index, inputs)
        block = self._model.block(index, tensors, call, inputs, rows, self._engine.device)
        self._leave_unreached(block, inputs)
        if self._warm is not None:
            block.factors.load(self._warm(index), f"block {index} of its segment")
        self._engine.call_hook(CalibrationCallback.on_block_start, block)
        return _Pending(block, tensors, target, seconds=time.perf_counter() - started)

    def _leave_unreached(self, block: QuantizedBlock, reached: Collection[str]) -> None:
        """Let experts that no token has reached be rounded to nearest, unless their factors have learned before."""
        layout = self._source.layouts[block.index]
        unreached = [name for name in layout.linears if name not in reached]
        if not unreached or self._model.start.is_learned:
            return
        block.factors.round_to_nearest(unreached)
        _log.warning(
            "block %d: no calibration token reached these experts: %s; their weights are rounded to nearest in their "
            "full range; more calibration samples reach more experts",
            block.index,
            _experts_of(unreached, layout),
        )

    def _learn(self, window: Sequence[_Pending]) -> None:
        """Let a window of blocks learn on the quantized stream in front of it; its time counts for the first."""
        started = time.perf_counter()
        hidden = self._streams.quantized
        self._measure_initial_losses(window)
        targets = [window[-1].target]
        if self._model.objective.aug_loss:
            targets.append(self._augmented_target(window))
        blocks = [entry.block for entry in window]
        needs_head = blocks[-1].index == len(self._source) - 1 and self._model.objective.output_loss == "kl"
        batches = HiddenStateBatches((hidden, *targets), self._batch_size, self._order, self._share)
        engine = self._engine
        with self._source.on(engine.device) if needs_head else nullcontext():
            epochs = engine.learn(blocks, self._model.rates, self._source.logits if needs_head else None, batches)
        for block in blocks:
            block.epochs += epochs
        window[0].seconds += time.perf_counter() - started

    def _measure_initial_losses(self, window: Sequence[_Pending]) -> None:
        """Measure the blocks that have not learned yet, behind those in front of them."""
        hidden = self._streams.quantized
        for position, entry in enumerate(window):
            if not any(math.isnan(later.block.loss_initial) for later in window[position:]):
                return
            with entry.block.held():
                hidden = self._engine.map(entry.block, hidden)
            if math.isnan(entry.block.loss_initial):
                entry.block.loss_initial = mean_squared_error(hidden, entry.target, self._engine.group)

    def _augmented_target(self, window: Sequence[_Pending]) -> HiddenStates:
        """Return the original blocks' output for the quantized stream."""
        if self._streams.are_equal:
            return window[-1].target
        hidden = self._streams.quantized
        for entry in window:
            original = self._source.make_block(entry.block.index, entry.tensors).to(self._engine.device)
            hidden = self._engine.map(partial(entry.block.call, original), hidden)
        return hidden

    def _advance(self, entry: _Pending) -> None:
        """Let a block be folded, measures it and move both streams behind it."""
        started = time.perf_counter()
        engine, block, hidden = self._engine, entry.block, self._streams.quantized
        engine.group.broadcast(block.factors.state_dict().values())
        if self._model.rounding.method == "gptq":
            observed = sorted(set(block.factors.shared_inputs.values()))
            columns = {name: entry.tensors[f"{name}.weight"].shape[1] for name in observed}
            add = partial(add_moments, columns=columns, device=engine.device, group=engine.group)
            block.choose_codes(lambda: engine.map(block, hidden, splits=False), add)
        engine.call_hook(CalibrationCallback.on_block_trained, block)
        if not block.is_folded:
            raise CalibrationError(f"block {block.index}: no callback has folded it; on_block_trained of one has to")
        check_equal_blocks(block.index, block.tensors.values(), engine.group)
        output = engine.map(block, hidden)
        seconds = entry.seconds + time.perf_counter() - started
        result = self._measure(block, entry.tensors, entry.target, output, seconds)
        self._streams.advance(entry.target, output)
        engine.call_hook(CalibrationCallback.on_block_end, block, result)
        self._kept.keep(block.index + 1, self._streams)

    def _measure(
        self,
        block: QuantizedBlock,
        tensors: Mapping[str, Tensor],
        target: HiddenStates,
        output: HiddenStates,
        seconds: float,
    ) -> BlockResult:
        """Measure a folded block next to round-to-nearest, both on the quantized stream in front of it."""
        engine = self._engine
        nearest = self._model.round_to_nearest(block.index, tensors, block.call).to(engine.device)
        group = engine.group
        # It is zero of tokens without embeddings.
        power = max(mean_square(target, group), torch.finfo(torch.float32).tiny)
        loss = mean_squared_error(output, target, group)
        nearest_loss = mean_squared_error(engine.map(nearest, self._streams.quantized), target, group)
        return BlockResult(
            index=block.index,
            loss_initial=block.loss_initial,
            loss_final=loss,
            relative_error_rtn=nearest_loss / power,
            relative_error=loss / power,
            seconds=seconds,
            epochs=block.epochs,
        )


@dataclass
class _Pending:
    """A block between its preparation and its folding."""

    block: QuantizedBlock
    tensors: dict[str, Tensor]
    """Its original tensors."""
    target: HiddenStates
    """Its full-precision output."""
    seconds: float


def _experts_of(linears: Sequence[str], layout: BlockLayout) -> str:
    """Return the numbers of the experts that have these linears."""
    assert layout.experts is not None  # every other linear is reached
    module = f"{layout.experts.module}."
    return ", ".join(map(str, sorted({int(name.removeprefix(module).partition(".")[0]) for name in linears})))
