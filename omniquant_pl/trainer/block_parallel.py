"""Segments of blocks at the same time: each from full-precision inputs, then, if asked for, stitched together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from omniquant_pl.calibration.engine import Engine
from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.calibration.resume import ResumeState
from omniquant_pl.calibration.segment_inputs import segment_inputs
from omniquant_pl.data import CalibrationData
from omniquant_pl.distributed import BlockParallelStrategy, balanced_segments
from omniquant_pl.evaluate import original_blocks
from omniquant_pl.evaluate.perplexity import BlockBuilder
from omniquant_pl.hidden_states import HiddenStatePair, HiddenStates
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer.block_trainer import BlockTrainer
from omniquant_pl.trainer.run_trainer import FitContext
from omniquant_pl.utils.files import replace_file

__all__ = ["SegmentedCalibration", "block_costs", "segment_settings"]


def segment_settings(strategy: BlockParallelStrategy) -> dict[str, Any]:
    """Return what decides of a block-parallel calibration beyond the settings of any other."""
    return {
        "segments": strategy.segment_count,
        "stitch_epochs": strategy.stitch_epochs,
        "stitch_blocks": strategy.stitch_blocks if strategy.stitch_epochs else None,
    }


def block_costs(model: OmniQuantModel) -> list[int]:
    """Return what calibrating each block costs, next to the others: multiplications of a token."""
    weights, source = model.quantized_weights, model.source
    names = [source.stored_names(index) for index in range(len(source))]
    return [
        sum(weights[name][1][0] * weights[name][1][1] for name in each.values() if name in weights) for each in names
    ]


class SegmentedCalibration:
    """Calibrates the segments that this process has to do with.

    Every segment leaves a run folder of its own in ``segments/``, in which it goes on after an interruption; at the end
    their blocks stand in the run's folder, as those of any run.

    Args:
        trainer: Fits blocks.
        strategy: Segments and processes.
        model: The model and its settings.
        data: Settings of batches.
        tokens: All token ids ``[samples, tokens]``.
    """

    def __init__(
        self,
        trainer: BlockTrainer,
        strategy: BlockParallelStrategy,
        model: OmniQuantModel,
        data: CalibrationData,
        tokens: Tensor,
    ) -> None:
        self._trainer, self._strategy, self._mesh = trainer, strategy, strategy.mesh
        self._model, self._data, self._tokens = model, data, tokens
        self._segments = balanced_segments(block_costs(model), strategy.segment_count)
        self._each = len(self._segments) // self._mesh.segments.size  # that one process does in turn
        self._root = trainer.run_folder

    def run(self) -> None:
        """Calibrate all segments, and join them."""
        folders = [RunFolder(self._root.segments / f"{number:05d}") for number in range(len(self._segments))]
        if self._trainer.resume_state(self._root).is_done(range(len(self._model.source))):
            self._join([self._root])
            return
        self._calibrate(folders, original_blocks(self._model.source))
        if self._strategy.stitch_epochs and len(folders) > 1:
            folders = self._stitch(folders)
        self._join(folders)

    @property
    def _own(self) -> range:
        """The segments that this process calibrates in turn."""
        first = self._mesh.segments.rank * self._each
        return range(first, first + self._each)

    def _calibrate(self, folders: list[RunFolder], build: BlockBuilder) -> None:
        """Calibrate every segment from full-precision inputs."""
        undone = [number for number in self._own if not self._is_done(number, folders[number])]
        inputs: dict[int, HiddenStates] = {}
        if self._mesh.world.any(bool(undone)):
            inputs = self._inputs(build, range(len(self._segments)), self._engine())
        for number in undone:
            streams = HiddenStatePair(inputs.pop(self._segments[number].start))
            with self._inside(folders[number]):
                self._calibrate_segment(number, streams, self._trainer.resume_state(folders[number]))
        self._mesh.world.barrier()

    def _stitch(self, drafts: list[RunFolder]) -> list[RunFolder]:
        """Let the first blocks of each segment but the first learn on what the drafts of those in front give."""
        folders = [drafts[0], *(RunFolder(draft.path / "stitched") for draft in drafts[1:])]
        undone = [n for n in self._own if n > 0 and not self._is_done(n, folders[n])]
        self._trainer.call_hook(CalibrationCallback.on_stitching_start, sum(map(len, self._segments[1:])))
        if self._mesh.world.any(bool(undone)):
            engine, stitched = self._engine(), range(1, len(drafts))
            originals = self._inputs(original_blocks(self._model.source), stitched, engine)
            quantized = self._inputs(self._drafted(drafts), stitched, engine)
        for number in undone:
            start = self._segments[number].start
            streams = HiddenStatePair(originals.pop(start), quantized.pop(start))
            with self._inside(folders[number], self._strategy.stitch_epochs):
                self._keep_draft(number, drafts[number])
                finished = self._trainer.resume_state(folders[number], resumes=True)
                self._calibrate_segment(number, streams, finished, drafts[number].load_factors)
        self._mesh.world.barrier()
        return folders

    def _drafted(self, drafts: list[RunFolder]) -> BlockBuilder:
        """Make the blocks as the segments have left them."""
        owner = {index: draft for draft, blocks in zip(drafts, self._segments, strict=True) for index in blocks}
        return lambda index, tensors, call: self._model.folded(index, tensors, call, owner[index].load_factors(index))

    def _keep_draft(self, number: int, draft: RunFolder) -> None:
        """Count the blocks behind those that are stitched as finished: they only get other inputs."""
        blocks, count = self._segments[number], self._strategy.stitch_blocks
        if self._trainer.is_global_zero:
            for index in () if count is None else blocks[count:]:
                _copy_block(index, draft, self._trainer.run_folder)
        self._trainer.group.barrier()

    def _engine(self) -> Engine:
        micro_batch_size, segments = self._data.micro_batch_size, len(self._segments)
        shares = self._mesh.data.size  # of what the inputs are put together to, too
        return self._trainer.engine(self._model, self._tokens, micro_batch_size, segments, self._each, shares)

    def _inputs(self, build: BlockBuilder, segments: range, engine: Engine) -> dict[int, HiddenStates]:
        """Return the hidden states in front of this process's segments, all processes taking part."""
        started = time.perf_counter()
        owners = {self._segments[number].start: number // self._each for number in segments}
        share = self._mesh.world.share(self._tokens)
        found = segment_inputs(self._model.source, build, share, owners, engine, self._mesh.segments)
        self._trainer.input_seconds += time.perf_counter() - started
        return found

    def _is_done(self, number: int, folder: RunFolder) -> bool:
        return self._trainer.resume_state(folder).is_done(self._segments[number])

    def _calibrate_segment(
        self,
        number: int,
        streams: HiddenStatePair,
        state: ResumeState,
        warm: Callable[[int], Mapping[str, Tensor]] | None = None,
    ) -> None:
        trainer, blocks = self._trainer, self._segments[number]
        trainer.call_hook(CalibrationCallback.on_segment_start, number, blocks)
        trainer.calibrate(self._model, self._data, len(self._tokens), blocks, streams, self._engine(), state, warm=warm)
        trainer.call_hook(CalibrationCallback.on_segment_end, number, blocks)

    @contextmanager
    def _inside(self, folder: RunFolder, epochs: int | None = None) -> Iterator[None]:
        """For a while, the trainer works in a segment's folder, with the processes that share its samples."""
        trainer = self._trainer
        epochs = trainer.epochs_per_block if epochs is None else epochs
        with self._strategy.inside(self._mesh.data):
            if trainer.is_global_zero:
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.keep_log()
            with trainer.inside(FitContext(folder, epochs)):
                yield

    def _join(self, folders: list[RunFolder]) -> None:
        """Put the blocks of all segments into the run's folder."""
        results = []
        parts = self._segments if len(folders) > 1 else [range(len(self._model.source))]
        for blocks, folder in zip(parts, folders, strict=True):
            finished = self._trainer.resume_state(folder, resumes=True)
            results += [result for result in map(finished.result, blocks) if result is not None]
            for index in blocks if self._mesh.world.is_first and folder is not self._root else ():
                _copy_block(index, folder, self._root)
        self._trainer.call_hook(CalibrationCallback.on_segments_joined, results)
        self._mesh.world.barrier()


def _copy_block(index: int, source: RunFolder, target: RunFolder) -> None:
    """Copy what is kept of a finished block."""
    if source.statistics_file(index).is_file():
        target.statistics.mkdir(exist_ok=True)
        _copy(source.statistics_file(index), target.statistics_file(index))
    _copy(source.factor_file(index), target.factor_file(index))


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    replace_file(target, lambda temporary: shutil.copyfile(source, temporary))
