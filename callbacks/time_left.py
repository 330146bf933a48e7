"""How long a run still takes, from what its blocks and evaluations have taken so far."""

from __future__ import annotations

import math

from omniquant_pl.model import OmniQuantModel

__all__ = ["TimeLeft", "last_block_cost"]

_HEAD_PRODUCTS, _BLOCK_PRODUCTS = 4, 3
"""Products of a step: of the head the target, the output, and two for gradients; of a block the output and two more."""


def last_block_cost(model: OmniQuantModel) -> float:
    """Return what the last block takes next to the others: more where it learns from the model's predictions.

    Args:
        model: The settings; its source is opened.
    """
    if model.objective.output_loss == "mse":
        return 1.0
    source, last = model.source, len(model.source) - 1
    shapes = source.block_shapes(last)
    weights = sum(math.prod(shapes[f"{name}.weight"]) for name in source.layouts[last].linears)
    head = int(source.config.hidden_size) * int(source.config.vocab_size)
    return 1 + _HEAD_PRODUCTS * head / (_BLOCK_PRODUCTS * weights)


class TimeLeft:
    """Adds up what is left: blocks, of which the last may take longer, and evaluations.

    Args:
        blocks: Blocks to calibrate.
        last_cost: What the last of them takes next to the others; see :func:`last_block_cost`.
        evaluations: Evaluations of the run, that of the original model among them.
    """

    def __init__(self, blocks: int, last_cost: float = 1.0, evaluations: int = 0) -> None:
        self._last_cost = last_cost
        self._blocks = blocks
        self._evaluations = evaluations
        self._block_seconds = self._evaluation_seconds = 0.0
        self._blocks_done = self._evaluations_done = self._blocks_timed = 0

    def add_blocks(self, count: int) -> None:
        """Count further blocks, which are calibrated once more."""
        self._blocks += count

    def block_done(self, seconds: float | None) -> None:
        """Note a block; ``None`` for one that was finished before."""
        self._blocks_done += 1
        if seconds is not None:
            self._block_seconds += seconds
            self._blocks_timed += 1

    def evaluation_done(self, seconds: float) -> None:
        """Note an evaluation."""
        self._evaluations_done += 1
        self._evaluation_seconds += seconds

    def evaluations_known(self, count: int) -> None:
        """Count evaluations that an earlier process has measured."""
        self._evaluations -= count

    @property
    def blocks_left(self) -> int:
        """Blocks that are still to be calibrated."""
        return max(0, self._blocks - self._blocks_done)

    @property
    def seconds(self) -> float | None:
        """What is left in seconds; ``None`` while no block has been timed, and when nothing is left."""
        if not self._blocks_timed:
            return None
        each = self._block_seconds / self._blocks_timed
        left = self.blocks_left
        blocks = each * (left - 1 + self._last_cost) if left else 0.0
        # Of a resumed run that has evaluated nothing, the forward passes are at most what its blocks take.
        evaluation = self._evaluation_seconds / self._evaluations_done if self._evaluations_done else 0.0
        evaluations = evaluation * max(0, self._evaluations - self._evaluations_done)
        return blocks + evaluations or None
