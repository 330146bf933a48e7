"""The two streams of activations between blocks, and the batches that a block learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["BatchOrder", "StreamBatches", "Streams", "map_batches"]

_TOKENS_PER_PASS = 8192
"""Tokens of one batch where no gradient is needed."""


@torch.no_grad()
def map_batches(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Applies a function to ``[samples, tokens, ...]`` some samples at a time and joins the results."""
    size = max(1, _TOKENS_PER_PASS // values.shape[1])
    return torch.cat([function(batch) for batch in values.split(size)])


class Streams:
    """Hidden states ``[samples, tokens, channels]`` in front of the current block.

    Attributes:
        full_precision: As the original model computes them.
        quantized: As the blocks that are folded already compute them.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.full_precision = hidden
        self.quantized = hidden

    @property
    def are_equal(self) -> bool:
        """Whether nothing has been quantized yet."""
        return self.full_precision is self.quantized

    def advance(self, full_precision: Tensor, quantized: Tensor) -> None:
        """Moves both streams behind the block."""
        self.full_precision, self.quantized = full_precision, quantized


class BatchOrder:
    """The order of the samples, a function of the seed and the block's epoch only.

    Args:
        samples: Number of samples.
        seed: Seed of the permutations.
        shuffle: Whether epochs differ in order; otherwise the samples' own order.
    """

    def __init__(self, samples: int, seed: int, shuffle: bool) -> None:
        self.samples = samples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._first_epoch = 0

    def start_block(self, epoch: int) -> None:
        """Counts epochs from here on: Lightning counts them over all blocks."""
        self._first_epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch - self._first_epoch

    def __call__(self) -> Tensor:
        """Returns the sample indices ``[samples]`` of the current epoch."""
        if not self.shuffle:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.samples, generator=generator)


class StreamBatches:
    """Iterates over inputs and targets of a block without a DataLoader, which would cost more than a small step.

    Args:
        tensors: Input and targets, ``[samples, tokens, channels]`` each.
        batch_size: Samples of a step; the last batch may be smaller.
        order: The order of the samples.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, order: BatchOrder) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.sampler = order
        self._first = self._done = 0

    def state_dict(self) -> dict[str, int]:
        """Returns how far the current epoch is; Lightning keeps it in checkpoints."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next epoch begin where another one was."""
        self._first = state["done"]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.sampler.samples / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yields batches; a batch of one is a view, larger ones are gathered."""
        first, self._first = self._first, 0
        for number, indices in enumerate(self.sampler().split(self.batch_size)):
            if number < first:
                continue
            self._done = number + 1
            if len(indices) == 1:
                start = int(indices)
                yield tuple(tensor[start : start + 1] for tensor in self.tensors)
            else:
                yield tuple(tensor[indices.to(tensor.device)] for tensor in self.tensors)
