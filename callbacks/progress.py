"""Two bars, blocks and steps, and a line for everything that is finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import override

from omniquant_pl.block import BlockModule
from omniquant_pl.callbacks.log_file import LogFile
from omniquant_pl.callbacks.segments import OtherSegments
from omniquant_pl.evaluate import perplexity_table
from omniquant_pl.hooks import BlockResult, CalibrationCallback
from omniquant_pl.memory import peak_memory
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quantized_block import QuantizedBlock
from omniquant_pl.trainer import SequentialTrainer
from omniquant_pl.wording import bytes_in_words, number, scientific, seconds_in_words

__all__ = ["ProgressCallback"]

_HOUR = 3600.0


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
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            speed_estimate_period=_HOUR,  # an epoch may take minutes
        )
        self._blocks = self._steps = TaskID(0)
        self._count = self._done = self._restored = 0
        self._started = self._learning_since = 0.0
        self._segment = ""
        self._others: OtherSegments | None = None

    def _say(self, line: str) -> None:
        text = Text(line)  # which is no markup: paths may have brackets
        text.highlight_regex(r"^[^:]+:", "bold")
        self.console.print(text)
        if self._log_file is not None:
            self._log_file.write(line)

    @override
    def on_ready(self, trainer: Trainer, model: OmniQuantModel) -> None:
        assert isinstance(trainer, SequentialTrainer)
        self._others = OtherSegments(trainer.run_folder.segments, self._on_other_block)
        if trainer.global_rank > 0:  # the first process says it all
            self.console.quiet = self._progress.disable = True
            self._log_file = None
        if self._log_file is not None:
            self._log_file.open()

    @override
    def on_calibration_start(self, trainer: Trainer, model: OmniQuantModel) -> None:
        assert isinstance(trainer, SequentialTrainer)
        self._started, self._count, self._done, self._restored = time.monotonic(), len(model.source), 0, 0
        self._say(f"{model.path}: {self._count} blocks to {model.scheme.name}, run folder {trainer.run_folder.path}")
        self._say(f"at most {trainer.epochs_per_block} epochs a block, on {trainer.strategy.root_device}")
        self._progress.start()
        self._blocks = self._progress.add_task("blocks", total=self._count, detail="")
        self._steps = self._progress.add_task("steps", total=None, detail="")

    @override
    def on_segment_start(self, trainer: Trainer, index: int, blocks: range) -> None:
        assert isinstance(trainer, SequentialTrainer)
        self._segment = f"segment {index}: "
        self._say(f"segment {index}: blocks {blocks[0]} to {blocks[-1]}")
        if self._others is not None and trainer.global_rank == 0:
            self._others.start(index)

    def _on_other_block(self, segment: int, block: Mapping[str, Any]) -> None:
        self._done += 1
        self._progress.update(self._blocks, completed=self._done)
        self._say(f"segment {segment}: {_line(block)}")

    @override
    def on_stitching_start(self, trainer: Trainer, blocks: int) -> None:
        self._done = self._count  # also what was finished before an interruption
        self._count += blocks
        self._progress.update(self._blocks, total=self._count)
        self._say(f"stitching: {blocks} blocks once more, on what those in front of them give")

    @override
    def on_segments_joined(self, trainer: Trainer, results: Sequence[BlockResult]) -> None:
        self._stop_others()
        self._progress.update(self._blocks, completed=self._count)

    def _stop_others(self) -> None:
        if self._others is not None:
            self._others.stop()

    @override
    def on_evaluation_start(self, trainer: Trainer, variant: str) -> None:
        self._progress.reset(self._steps, total=None, description=f"perplexity, {variant.replace('_', ' ')}", detail="")

    @override
    def on_evaluation_end(
        self, trainer: Trainer, variant: str, perplexities: Mapping[str, float], seconds: float
    ) -> None:
        found = ", ".join(f"{name} {number(value)}" for name, value in perplexities.items())
        self._say(f"perplexity, {variant.replace('_', ' ')}: {found}; {seconds_in_words(seconds)}")

    @override
    def on_block_start(self, trainer: Trainer, block: QuantizedBlock) -> None:
        self._learning_since = self._learning_since or time.monotonic()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, SequentialTrainer)
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
        assert isinstance(trainer, SequentialTrainer)
        self._progress.advance(self._steps, float(trainer.num_training_batches))
        # Parts of a block count as well, or nothing could be said of the time before the first one is finished.
        part = min(self._progress.tasks[self._blocks].completed + 1 / trainer.epochs_per_block, self._done + 0.99)
        self._progress.update(self._blocks, completed=part, refresh=True)

    @override
    def on_block_restored(self, trainer: Trainer, result: BlockResult) -> None:
        self._done, self._restored = self._done + 1, self._restored + 1
        self._progress.update(self._blocks, completed=self._done)
        self._say(f"{self._segment}block {result.index}: finished before, error {scientific(result.relative_error)}")

    @override
    def on_block_end(self, trainer: Trainer, block: QuantizedBlock, result: BlockResult) -> None:
        self._done += 1
        memory = _memory(trainer)
        self._progress.update(self._blocks, completed=self._done, detail=f"peak memory {memory}")
        self._say(f"{self._segment}{_line(asdict(result))}, {memory}{self._time_left()}")

    def _time_left(self) -> str:
        left = max(0, self._count - self._done)
        each = (time.monotonic() - self._learning_since) / max(1, self._done - self._restored)
        return f"; {left} to go, about {seconds_in_words(left * each)}" if left else ""

    @override
    def on_calibration_end(self, trainer: Trainer, model: OmniQuantModel) -> None:
        assert isinstance(trainer, SequentialTrainer)
        self._progress.stop()
        metrics = trainer.run_folder.read_metrics()
        if metrics:
            self.console.print(perplexity_table(metrics["perplexity"]))
        if trainer.run_folder.report.is_file():
            self._say(f"report: {trainer.run_folder.report}")
        took = seconds_in_words(time.monotonic() - self._started)
        self._say(f"finished in {took}: {trainer.run_folder.path}")
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


def _line(block: Mapping[str, Any]) -> str:
    """What became of a block; in files a number that is not finite is null."""
    keys = ("relative_error", "relative_error_rtn", "loss_initial", "loss_final")
    error, nearest, initial, final = (scientific(block[key]) for key in keys)
    return (
        f"block {block['index']}: error {error} of the output's power, round-to-nearest {nearest}; "
        f"loss {initial} -> {final}; {block['epochs']} epochs, {seconds_in_words(block['seconds'])}"
    )


def _memory(trainer: Trainer) -> str:
    peak = peak_memory(trainer.strategy.root_device)
    device = f", {bytes_in_words(peak['device'])} on the device" if peak["device"] else ""
    return f"{bytes_in_words(peak['host'])}{device}"
