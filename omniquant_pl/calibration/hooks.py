"""What a callback can hear beyond Lightning's hooks, which fire once a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from omniquant_pl.blocks.quantized_block import QuantizedBlock
    from omniquant_pl.model import OmniQuantModel
    from omniquant_pl.quant import ChannelRange

__all__ = ["BlockResult", "CalibrationCallback"]


@dataclass(frozen=True)
class BlockResult:
    """What became of one block.

    Attributes:
        index: Position of the block.
        loss_initial: Mean squared error against the target before learning.
        loss_final: The same of the folded block.
        relative_error_rtn: Error over the target's mean square of round-to-nearest, in the quantized stream; of the
            rotated block with ``model.rotation``.
        relative_error: The same of the folded block.
        seconds: Time spent on the block.
        epochs: Epochs learned.
    """

    index: int
    loss_initial: float
    loss_final: float
    relative_error_rtn: float
    relative_error: float
    seconds: float
    epochs: int


class CalibrationCallback(Callback):
    """A Lightning callback that also hears about the calibration as a whole. All hooks do nothing by default.

    Hooks are called in the order of the callbacks, those that end something in reverse: callbacks nest.
    """

    def on_ready(self, trainer: Trainer, model: OmniQuantModel) -> None:
        """Model and data are ready, nothing has been written; whoever cannot do what it is meant to refuses here."""

    def on_calibration_start(self, trainer: Trainer, model: OmniQuantModel) -> None:
        """The run begins; no block has been touched."""

    def on_baseline(self, trainer: Trainer, model: OmniQuantModel) -> None:
        """Everybody has started; whoever measures what the model is compared with does so here."""

    def on_evaluation_start(self, trainer: Trainer, variant: str) -> None:
        """The perplexity of a variant of the model is about to be measured."""

    def on_evaluation_end(
        self, trainer: Trainer, variant: str, perplexities: Mapping[str, float], seconds: float
    ) -> None:
        """It has been measured: perplexity by name of the evaluation set, and how long that took."""

    def on_segment_start(self, trainer: Trainer, index: int, blocks: range) -> None:
        """A segment of the blocks is about to be calibrated in a folder of its own, at the same time as others."""

    def on_segment_end(self, trainer: Trainer, index: int, blocks: range) -> None:
        """Every block of the segment is folded."""

    def on_stitching_start(self, trainer: Trainer, blocks: int) -> None:
        """Segments are about to be gone through once more: so many blocks, over all processes, are heard of again."""

    def on_segments_joined(self, trainer: Trainer, results: Sequence[BlockResult]) -> None:
        """All segments are done, and what became of every block is known."""

    def on_block_restored(self, trainer: Trainer, result: BlockResult) -> None:
        """A block that was finished before an interruption is behind both streams again."""

    def on_inputs_observed(self, trainer: Trainer, index: int, inputs: Mapping[str, ChannelRange]) -> None:
        """The calibration set has passed a block in full precision: the input ranges of its linears, by name."""

    def on_block_start(self, trainer: Trainer, block: QuantizedBlock) -> None:
        """A block's factors are initialised; Lightning's fit hooks come next."""

    def on_block_trained(self, trainer: Trainer, block: QuantizedBlock) -> None:
        """A block has learned; whoever folds it does so here."""

    def on_block_end(self, trainer: Trainer, block: QuantizedBlock, result: BlockResult) -> None:
        """A block is folded and measured, and both streams are behind it."""

    def on_calibration_end(self, trainer: Trainer, model: OmniQuantModel) -> None:
        """Every block is folded."""
