"""Perplexity with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from omniquant_pl.checkpoint import BlockCall, SourceModel
from omniquant_pl.distributed import Group
from omniquant_pl.hidden_states import HiddenStates, MemoryBudget, map_hidden_states
from omniquant_pl.utils.memory import return_free_memory

__all__ = ["BlockBuilder", "CalledBlock", "original_blocks", "perplexity"]

BlockBuilder = Callable[[int, dict[str, Tensor], BlockCall], nn.Module]
"""Makes the block to evaluate from its position, its original tensors and how the model calls it.

The result takes hidden states ``[batch, tokens, channels]`` and returns the next ones.
"""


class CalledBlock(nn.Module):
    """A block, and how the model calls it.

    Args:
        block: Of the model's own class.
        call: What it gets besides hidden states.
    """

    def __init__(self, block: nn.Module, call: BlockCall) -> None:
        super().__init__()
        self.block = block
        self._call = call

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the block on ``[batch, tokens, channels]``."""
        return self._call(self.block, hidden)


def original_blocks(source: SourceModel) -> BlockBuilder:
    """Return the builder of the full-precision model."""
    return lambda index, tensors, call: CalledBlock(source.make_block(index, tensors), call)


@torch.no_grad()
def perplexity(
    source: SourceModel,
    build: BlockBuilder,
    tokens: Tensor,
    room: MemoryBudget,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    group: Group | None = None,
) -> float:
    """Measure a model over windows of tokens, the first token of each not predicted.

    Args:
        source: The original model, whose embedding and head are used.
        build: Makes the blocks in between.
        tokens: Token ids ``[windows, length]``.
        room: Where to compute, and what hidden states may take: two copies, in float32.
        context: Precision context of the forward passes.
        group: Processes that share the windows.

    Returns:
        exp of the mean negative log-likelihood over all predicted tokens.
    """
    group = group or Group()
    share = group.share(tokens)
    count = len(share) * (tokens.shape[1] - 1)
    mean = _mean_loss(source, build, share, room, context) if count else 0.0
    total, predicted = group.total((mean * count, count))
    return float(torch.tensor(total / predicted, dtype=torch.float64).exp())  # infinite where math.exp overflows


def _mean_loss(
    source: SourceModel,
    build: BlockBuilder,
    tokens: Tensor,
    room: MemoryBudget,
    context: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Return the mean negative log-likelihood over this process's tokens."""
    storage = room.storage(2 * tokens.numel() * source.config.hidden_size)
    with source.on(room.device):
        calls = source.calls(tokens.shape[1])
        with context():
            hidden = map_hidden_states(source.embed, tokens, storage)
    with context():
        for index in range(len(source)):
            block = build(index, source.block_tensors(index), calls[index]).to(room.device)
            hidden = map_hidden_states(lambda batch, block=block: block(batch).float(), hidden, storage)  # type: ignore[misc]
            del block
            return_free_memory()
    with source.on(room.device):
        return _mean_loss_of(source, hidden, tokens.to(room.device))


def _mean_loss_of(source: SourceModel, hidden: HiddenStates, tokens: Tensor) -> float:
    """Return the same from the last block's output, window by window."""
    mean = MeanMetric(sync_on_compute=False).set_dtype(torch.float64)
    for states, window in zip(hidden.parts(1), tokens.split(1), strict=True):
        # Not torchmetrics' Perplexity: its softmax is zero, and its logarithm infinite, 104 below the highest logit.
        loss = F.cross_entropy(source.logits(states)[0, :-1].float(), window[0, 1:], reduction="none")
        mean.update(loss.cpu().double())
    return float(mean.compute())
