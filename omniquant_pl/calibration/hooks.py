"""What a callback hears beyond Lightning's hooks, which fire once a block, and what it sees of the trainer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.evaluate import Evaluation
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.signals import SignalHandler

__all__ = [
    "BlockResult",
    "CalibrationCallback",
    "CalibrationTrainer",
    "FoldingCallback",
    "HookCaller",
    "calibration_trainer",
]


_P = ParamSpec("_P")
_Hook = TypeVar("_Hook", bound=Callable[..., None])

_CALLED_IN_REVERSE: set[str] = set()
"""Hooks that end something: callbacks nest, so the last to start is the first to end."""


def _ends(hook: _Hook) -> _Hook:
    """Mark a hook that :meth:`CalibrationTrainer.call_hook` calls in the reverse order of the callbacks."""
    _CALLED_IN_REVERSE.add(hook.__name__)
    return hook


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


class CalibrationTrainer(Trainer):
    """What callbacks see of the trainer beyond Lightning's own.

    Attributes:
        signals: Notes the signals that end a calibration.
        fingerprint: Digests of what decides what the calibration learns.
        resumes: Whether an earlier run is resumed.
        first_epoch: Lightning's number of the current block's first epoch.
        input_seconds: Time spent on the inputs of segments.
        evaluation_tokens: Token ids ``[windows, length]`` by name of the evaluation set.
    """

    signals: SignalHandler
    fingerprint: dict[str, str]
    resumes: bool
    first_epoch: int
    input_seconds: float
    evaluation_tokens: dict[str, Tensor]

    @property
    @abstractmethod
    def run_folder(self) -> RunFolder:
        """The folder that the current blocks are written to: the run's, or its segment's."""

    @property
    @abstractmethod
    def epochs_per_block(self) -> int:
        """Epochs that a block learns."""

    @property
    def calibration_callbacks(self) -> list[CalibrationCallback]:
        """The callbacks that hear of more than Lightning's hooks, in their order."""
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, CalibrationCallback)]

    @property
    def forces_resume(self) -> bool:
        """Whether a callback asks to resume a run although it belongs to something else."""
        return any(callback.forces_resume for callback in self.calibration_callbacks)

    def call_hook(
        self,
        hook: Callable[Concatenate[CalibrationCallback, CalibrationTrainer, _P], None],
        /,
        *arguments: _P.args,
        **options: _P.kwargs,
    ) -> None:
        """Call a hook on every :class:`CalibrationCallback`: in their order, a hook that ends something in reverse.

        Args:
            hook: The hook of the base class, such as ``CalibrationCallback.on_block_start``.
            arguments: What it takes after the trainer.
            options: Likewise, by name.
        """
        callbacks = self.calibration_callbacks
        for callback in reversed(callbacks) if hook.__name__ in _CALLED_IN_REVERSE else callbacks:
            getattr(callback, hook.__name__)(self, *arguments, **options)

    @abstractmethod
    def evaluation(self, model: OmniQuantModel) -> Evaluation:
        """Return what measures the perplexities of the run."""


class HookCaller(Protocol):
    """:meth:`CalibrationTrainer.call_hook`, for what calls hooks without knowing the trainer."""

    def __call__(
        self,
        hook: Callable[Concatenate[CalibrationCallback, CalibrationTrainer, _P], None],
        /,
        *arguments: _P.args,
        **options: _P.kwargs,
    ) -> None:
        """Call a hook on every callback."""


def calibration_trainer(trainer: Trainer) -> CalibrationTrainer:
    """Return the trainer that one of Lightning's own hooks got as what it is.

    Raises:
        TypeError: If a callback of this project is used with another trainer.
    """
    if not isinstance(trainer, CalibrationTrainer):
        raise TypeError(f"this callback works with a CalibrationTrainer, not with {type(trainer).__name__}")
    return trainer


class CalibrationCallback(Callback):
    """A Lightning callback that also hears about the calibration as a whole. All hooks do nothing by default.

    Hooks are called in the order of the callbacks, those that end something in reverse: callbacks nest.
    """

    @property
    def forces_resume(self) -> bool:
        """Whether this callback asks to resume a run that belongs to something else."""
        return False

    def on_ready(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        """Refuse what cannot work: model and data are ready, and nothing has been written."""

    def on_calibration_start(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        """Start: the run begins, and no block has been touched."""

    def on_baseline(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        """Evaluate baselines: every callback has started."""

    def on_evaluation_start(self, trainer: CalibrationTrainer, variant: str) -> None:
        """Announce that the perplexity of a variant of the model is about to be measured."""

    @_ends
    def on_evaluation_end(
        self, trainer: CalibrationTrainer, variant: str, perplexities: Mapping[str, float], seconds: float
    ) -> None:
        """Take what was measured: perplexity by name of the evaluation set, and how long that took."""

    def on_segment_start(self, trainer: CalibrationTrainer, index: int, blocks: range) -> None:
        """Start a segment: its blocks are calibrated in a folder of their own, at the same time as others."""

    @_ends
    def on_segment_end(self, trainer: CalibrationTrainer, index: int, blocks: range) -> None:
        """End a segment: every block of it is folded."""

    def on_stitching_start(self, trainer: CalibrationTrainer, blocks: int) -> None:
        """Start stitching: so many blocks, over all processes, are calibrated once more."""

    def on_segments_joined(self, trainer: CalibrationTrainer, results: Sequence[BlockResult]) -> None:
        """Join segments: all are done, and the result of every block is known."""

    def on_block_restored(self, trainer: CalibrationTrainer, result: BlockResult) -> None:
        """Take a block that was finished before an interruption: both streams are behind it again."""

    def on_inputs_observed(self, trainer: CalibrationTrainer, index: int, inputs: Mapping[str, ChannelRange]) -> None:
        """Take the input ranges of a block's linears, by name: the calibration set has passed it in full precision."""

    def on_block_start(self, trainer: CalibrationTrainer, block: QuantizedBlock) -> None:
        """Start a block: its factors are initialised, and Lightning's fit hooks come next."""

    def on_block_trained(self, trainer: CalibrationTrainer, block: QuantizedBlock) -> None:
        """Take a block that has learned; :class:`FoldingCallback` folds it here."""

    @_ends
    def on_block_end(self, trainer: CalibrationTrainer, block: QuantizedBlock, result: BlockResult) -> None:
        """End a block: it is folded and measured, and both streams are behind it."""

    @_ends
    def on_calibration_end(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        """End: every block is folded."""


class FoldingCallback(CalibrationCallback):
    """A callback that folds blocks; a fit without one is refused before any work."""

    @abstractmethod
    def on_block_trained(self, trainer: CalibrationTrainer, block: QuantizedBlock) -> None:
        """Fold the block (:meth:`QuantizedBlock.fold`)."""
