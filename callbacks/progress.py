"""Two bars, blocks and steps, and a line for everything that is finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text
from typing_extensions import override

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback, CalibrationTrainer, calibration_trainer
from omniquant_pl.callbacks.log_file import LogFile
from omniquant_pl.callbacks.progress_lines import block_line, divergence, encodable, finish_lines, variant_name
from omniquant_pl.callbacks.segments import RemoteSegments
from omniquant_pl.callbacks.time_left import TimeLeft, last_block_cost
from omniquant_pl.evaluate import VARIANTS
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.utils.formatting import duration, format_bytes, number, small
from omniquant_pl.utils.memory import peak_memory

__all__ = ["ProgressCallback"]


class ProgressCallback(CalibrationCallback):
    """Shows what is happening, how far it is, how long it takes, and what it costs.

    Bars are drawn by a timer and at every epoch, not by the steps; where the output is not a terminal, only the lines
    are written.

    Args:
        quiet: Write nothing to the terminal but warnings and errors.
        log_file: A file that gets the lines and the warnings as well, each with its time, also when quiet; a run that
            goes on adds to it. null: none.
    """

    def __init__(self, quiet: bool = False, log_file: str | None = None) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._log_file = None if log_file is None else LogFile(Path(log_file))
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            expand=True,
        )
        self._blocks = self._steps = TaskID(0)
        self._count = self._done = 0
        self._started = 0.0
        self._left = TimeLeft(0)
        self._model: OmniQuantModel | None = None
        self._losses: list[float] = []
        self._segment = ""
        self._others: RemoteSegments | None = None

    def _say(self, line: str) -> None:
        text = Text(encodable(line, self.console.encoding))  # which is no markup: paths may have brackets
        text.highlight_regex(r"^[^:]+:", "bold")
        self.console.print(text)
        if self._log_file is not None:
            self._log_file.write(line)

    @override
    def on_ready(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._others = RemoteSegments(trainer.run_folder.segments, self._on_other_block)
        if trainer.global_rank > 0:  # the first process says it all
            self.console.quiet = self._progress.disable = True
            self._log_file = None
        if self._log_file is not None:
            self._log_file.open()

    @override
    def on_calibration_start(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._started, self._count, self._done = time.monotonic(), len(model.source), 0
        self._say(f"{model.path}: {self._count} blocks to {model.scheme.name}, run folder {trainer.run_folder.path}")
        self._say(f"at most {trainer.epochs_per_block} epochs a block, on {trainer.strategy.root_device}")
        self._model = model
        evaluations = len(VARIANTS) if trainer.evaluation_tokens else 0
        self._left = TimeLeft(self._count, last_block_cost(model), evaluations)
        self._progress.start()
        self._blocks = self._progress.add_task("blocks", total=self._count, detail="")
        self._steps = self._progress.add_task("steps", total=None, detail="")

    @override
    def on_segment_start(self, trainer: CalibrationTrainer, index: int, blocks: range) -> None:
        self._segment = f"segment {index} · "
        self._say(f"segment {index}: blocks {blocks[0]} to {blocks[-1]}")
        if self._others is not None and trainer.global_rank == 0:
            self._others.start(index)

    def _on_other_block(self, segment: int, block: Mapping[str, Any]) -> None:
        self._done += 1
        self._progress.update(self._blocks, completed=self._done)
        self._left.block_done(None)
        self._say(block_line(block, self._blocks_of_model, segment=f"segment {segment} · "))

    @override
    def on_stitching_start(self, trainer: CalibrationTrainer, blocks: int) -> None:
        self._done = self._count  # also what was finished before an interruption
        self._count += blocks
        self._left.add_blocks(blocks)
        self._progress.update(self._blocks, total=self._count)
        self._say(f"stitching: {blocks} blocks once more, on what those in front of them give")

    @override
    def on_segments_joined(self, trainer: CalibrationTrainer, results: Sequence[BlockResult]) -> None:
        self._stop_others()
        self._progress.update(self._blocks, completed=self._count)

    def _stop_others(self) -> None:
        if self._others is not None:
            self._others.stop()

    @override
    def on_evaluation_start(self, trainer: CalibrationTrainer, variant: str) -> None:
        self._progress.reset(self._steps, total=None, description="perplexity", detail=variant_name(variant))

    @override
    def on_evaluation_end(
        self, trainer: CalibrationTrainer, variant: str, perplexities: Mapping[str, float], seconds: float
    ) -> None:
        found = ", ".join(f"{name} {number(value)}" for name, value in perplexities.items())
        self._left.evaluation_done(seconds)
        self._say(f"perplexity, {variant_name(variant)}: {found} · {duration(seconds)}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer = calibration_trainer(trainer)
        steps = trainer.epochs_per_block * int(trainer.num_training_batches)
        self._progress.reset(self._steps, total=steps, description="steps", detail="")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BlockModule)
        losses = pl_module.epoch_losses
        loss = f", loss {losses[-1]:.3e}" if losses else ""
        detail = f"block {pl_module.index}, epoch {len(losses) + 1}{loss}"
        self._progress.update(self._steps, detail=detail, refresh=True)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer = calibration_trainer(trainer)
        self._progress.advance(self._steps, float(trainer.num_training_batches))
        # Parts of a block count as well, or nothing could be said of the time before the first one is finished.
        part = min(self._progress.tasks[self._blocks].completed + 1 / trainer.epochs_per_block, self._done + 0.99)
        self._progress.update(self._blocks, completed=part, refresh=True)
        assert isinstance(pl_module, BlockModule)
        self._losses = list(pl_module.epoch_losses)

    @override
    def on_block_restored(self, trainer: CalibrationTrainer, result: BlockResult) -> None:
        self._done += 1
        self._progress.update(self._blocks, completed=self._done)
        self._left.block_done(None)
        place = f"{self._segment}block {result.index + 1}/{self._blocks_of_model}"
        self._say(f"{place} · finished before · error {small(result.relative_error)}")

    @override
    def on_block_end(self, trainer: CalibrationTrainer, block: QuantizedBlock, result: BlockResult) -> None:
        self._done += 1
        self._left.block_done(result.seconds)
        left = self._left.seconds
        memory = f"peak memory {_memory(trainer)}"
        detail = memory if left is None else f"{duration(left)} left · {memory}"
        self._progress.update(self._blocks, completed=self._done, detail=detail)
        self._say(block_line(asdict(result), self._blocks_of_model, left, self._objective(result.index), self._segment))

    @property
    def _blocks_of_model(self) -> int:
        assert self._model is not None
        return len(self._model.source)

    def _objective(self, index: int) -> str | None:
        """Return what the last block learns from, where that is the model's predictions."""
        assert self._model is not None
        learns_predictions = self._model.objective.output_loss == "kl" and index == self._blocks_of_model - 1
        return divergence(self._losses) if learns_predictions else None

    @override
    def on_calibration_end(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._progress.stop()
        run = trainer.run_folder
        if run.report.is_file():
            self._say(f"report: {run.report}")
        exported = run.model if run.model.is_dir() else None
        name, took = Path(model.path).name or model.path, time.monotonic() - self._started
        has_text = model.source.tokenizer is not None
        for line in finish_lines(name, model.scheme.name, run.read_metrics(), exported, run.config, took, has_text):
            self._say(line)
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()
        self._stop_others()
        if self._log_file is not None:
            self._log_file.write(f"stopped: {type(exception).__name__}: {exception}")
        self._close()

    def _close(self) -> None:
        if self._log_file is not None:
            self._log_file.close()


def _memory(trainer: Trainer) -> str:
    peak = peak_memory(trainer.strategy.root_device)
    device = f", {format_bytes(peak['device'])} on the device" if peak["device"] else ""
    return f"{format_bytes(peak['host'])}{device}"
