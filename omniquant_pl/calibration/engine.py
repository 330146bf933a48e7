"""What the calibration needs of the trainer: a device, room for streams, and how blocks are run and fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import HookCaller
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.distributed import Group
from omniquant_pl.hidden_states import HiddenStateBatches, HiddenStates, Storage, map_hidden_states
from omniquant_pl.spec import FactorRates

__all__ = ["Engine", "hidden_state_count"]


def hidden_state_count(window: int, segments: int = 1, in_turn: int = 1) -> int:
    """Return how many streams of all samples a process has at once, at most.

    They are two in front of a block, two behind it (its output and, to compare with, that of round-to-nearest), and the
    targets of its window; an augmented target is gone before anything is measured. Of segments, both inputs are added.

    Args:
        window: Blocks that learn together.
        segments: Segments of the calibration.
        in_turn: How many of them a process calibrates one after the other.
    """
    return 4 + window + (2 * in_turn if segments > 1 else 0)


class Engine:
    """What the calibration needs of the trainer.

    Args:
        device: Where blocks are computed.
        storage: Where streams are kept.
        context: Precision context of a forward pass.
        fit_block: Fits the module of a block, or of a window of blocks, to batches.
        steps: Returns the optimizer steps of a fit with so many batches an epoch.
        call_hook: Calls a hook of the callbacks with its arguments.
        pause: Called where an interruption loses nothing.
        group: The processes that have the other samples; the streams of this one hold its share.
        micro_batch_size: Samples that are computed at once; ``None`` for as many as fill the device, and all of a step.
    """

    def __init__(
        self,
        device: torch.device,
        storage: Storage,
        context: Callable[[], AbstractContextManager[Any]],
        fit_block: Callable[[BlockModule, HiddenStateBatches], None],
        steps: Callable[[int], int],
        call_hook: HookCaller,
        pause: Callable[[], None] = lambda: None,
        group: Group | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        self.device = device
        self.storage = storage
        self.context = context
        self._fit_block = fit_block
        self._steps = steps
        self.call_hook = call_hook
        self.pause = pause
        self.group = group or Group()
        self.micro_batch_size = micro_batch_size
        self._fitting_size = micro_batch_size  # falls where memory runs out

    def learn(
        self,
        blocks: Sequence[QuantizedBlock],
        rates: FactorRates,
        head: Callable[[Tensor], Tensor] | None,
        batches: HiddenStateBatches,
    ) -> int:
        """Let blocks learn together from batches, each block left on the device.

        Args:
            blocks: Consecutive blocks, in order.
            rates: Learning rates, and how they change.
            head: As of :class:`BlockModule`.
            batches: Inputs of the first block, and one or two targets of the last one.

        Returns:
            The number of epochs learned.
        """
        module = BlockModule(
            blocks,
            rates,
            head,
            steps=self._steps(len(batches)),
            micro_batch_size=self._fitting_size,
            sums_exactly=self.micro_batch_size is not None,
            group=self.group,
            samples_of=batches.samples_of,
        )
        self._fit_block(module, batches)
        self._fitting_size = module.micro_batch_size
        for block in blocks:
            block.to(self.device)  # a fit ends with what has learned on the CPU
        module.release()
        return len(module.epoch_losses)

    def embed(self, source: SourceModel, tokens: Tensor) -> HiddenStates:
        """Return the hidden states in front of the first block for token ids ``[samples, tokens]``."""
        with source.on(self.device):
            return map_hidden_states(source.embed, tokens, self.storage, micro_batch_size=self.micro_batch_size)

    def map(self, function: Callable[[Tensor], Tensor], hidden: HiddenStates, splits: bool = True) -> HiddenStates:
        """Run a block over a stream without gradients; see :func:`map_hidden_states`."""
        with self.context():
            return map_hidden_states(
                lambda batch: function(batch).float(), hidden, self.storage, splits, self.micro_batch_size
            )
