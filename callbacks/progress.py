"""Two bars, blocks and epochs, and a line for every finished block."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from omniquant_pl.block import BlockModule
from omniquant_pl.evaluate import perplexity_table
from omniquant_pl.hooks import BlockResult, CalibrationCallback
from omniquant_pl.memory import peak_memory
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quantized_block import QuantizedBlock
from omniquant_pl.trainer import SequentialTrainer

__all__ = ["ProgressCallback"]


class ProgressCallback(CalibrationCallback):
    """Shows what is happening, how far it is, how long it takes, and what it costs.

    Bars are drawn by a timer, not by the steps; where the output is not a terminal, only the lines are written.

    Args:
        quiet: Write nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._blocks = self._epochs = TaskID(0)

    @override
    def on_calibration_start(self, trainer: Trainer, model: OmniQuantModel) -> None:
        assert isinstance(trainer, SequentialTrainer)
        count = len(model.source)
        self.console.print(f"{model.path}: {count} blocks to {model.scheme.name}, run folder {trainer.run_folder.path}")
        self._progress.start()
        self._blocks = self._progress.add_task("blocks", total=count, detail="")
        self._epochs = self._progress.add_task("steps", total=None, detail="")

    @override
    def on_evaluation_start(self, trainer: Trainer, variant: str) -> None:
        self.console.print(f"measuring the perplexity of the {variant.replace('_', ' ')} model")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, SequentialTrainer)
        steps = trainer.epochs_per_block * int(trainer.num_training_batches)
        self._progress.reset(self._epochs, total=steps, detail="")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BlockModule)
        losses = pl_module.epoch_losses
        loss = f", loss {losses[-1]:.3e}" if losses else ""
        self._progress.update(self._epochs, detail=f"epoch {len(losses) + 1}{loss}")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.advance(self._epochs, float(trainer.num_training_batches))

    @override
    def on_block_restored(self, trainer: Trainer, result: BlockResult) -> None:
        self._progress.update(self._blocks, advance=1)
        self.console.print(f"block {result.index}: finished before, error {_shown(result.relative_error)}")

    @override
    def on_block_end(self, trainer: Trainer, block: QuantizedBlock, result: BlockResult) -> None:
        self._progress.update(self._blocks, advance=1, detail=_memory(trainer))
        self.console.print(
            f"block {result.index}: error {result.relative_error:.2e} of the output's power, "
            f"round-to-nearest {result.relative_error_rtn:.2e}; loss {result.loss_initial:.2e} -> "
            f"{result.loss_final:.2e}; {result.epochs} epochs, {result.seconds:.1f} s"
        )

    @override
    def on_calibration_end(self, trainer: Trainer, model: OmniQuantModel) -> None:
        assert isinstance(trainer, SequentialTrainer)
        self._progress.stop()
        metrics = trainer.run_folder.read_metrics()
        if metrics:
            self.console.print(perplexity_table(metrics["perplexity"]))
        self.console.print(f"finished: {trainer.run_folder.path}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()


def _shown(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.2e}"


def _memory(trainer: Trainer) -> str:
    peak = peak_memory(trainer.strategy.root_device)
    device = f", {peak['device'] / 1e9:.1f} GB on the device" if peak["device"] else ""
    return f"peak memory {peak['host'] / 1e9:.1f} GB{device}"
