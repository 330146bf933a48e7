"""Batches of streams: for learning, and for passes without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from omniquant_pl.hidden_states.states import HiddenStates
from omniquant_pl.hidden_states.storage import Storage
from omniquant_pl.utils.memory import make_room

__all__ = ["BatchOrder", "HiddenStateBatches", "map_hidden_states", "read_ahead"]

_TOKENS_PER_PASS, _TOKENS_PER_CPU_PASS = 8192, 2048
"""Tokens of one batch where no gradient is needed: enough to fill a device, few enough for a processor's caches."""

_T = TypeVar("_T")


def _samples_per_pass(tokens: int, device: torch.device) -> int:
    return max(1, (_TOKENS_PER_CPU_PASS if device.type == "cpu" else _TOKENS_PER_PASS) // tokens)


@torch.no_grad()
def map_hidden_states(
    function: Callable[[Tensor], Tensor],
    source: HiddenStates | Tensor,
    storage: Storage,
    splits: bool = True,
    micro_batch_size: int | None = None,
) -> HiddenStates:
    """Apply a function to the samples of a stream, or to token ids, some at a time.

    Where the streams are not on the device, the next batch is read and the last one written while the function runs.

    Args:
        function: Takes ``[batch, tokens, channels]`` in float32, or token ids ``[batch, tokens]``; returns hidden
            states.
        source: A stream, or token ids ``[samples, tokens]``.
        storage: Where the result goes.
        splits: Whether samples that do not fit into memory are taken in halves; not if the function counts its calls.
        micro_batch_size: Samples that the function gets at once; ``None`` for as many as fill a device.

    Returns:
        The results for all samples.
    """
    size = micro_batch_size or _samples_per_pass(source.shape[1], storage.device)
    slices = [slice(start, start + size) for start in range(0, len(source), size)]
    read = source.read if isinstance(source, HiddenStates) else source.__getitem__
    is_direct = storage.place == "device" and (not isinstance(source, HiddenStates) or source.is_direct)
    inputs = (read(samples) for samples in slices)
    result: HiddenStates | None = None
    with _Writer(is_direct) as writer:
        for samples, batch in zip(slices, inputs if is_direct else read_ahead(inputs), strict=True):
            output = _in_halves(function, batch) if splits else function(batch)
            if result is None:
                result = storage.empty((len(source), *output.shape[1:]))
            writer.write(result, samples, output)
    assert result is not None
    return result


def _in_halves(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    try:
        return function(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    make_room()
    return torch.cat([_in_halves(function, half) for half in batch.split(math.ceil(len(batch) / 2))])


class _Writer:
    """Writes batches, one of them while the next is computed."""

    def __init__(self, is_direct: bool) -> None:
        self._pool = None if is_direct else ThreadPoolExecutor(1, thread_name_prefix="omniquant-write")
        self._last: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, stream: HiddenStates, samples: slice, output: Tensor) -> None:
        if self._pool is None:
            stream.write(samples, output)
            return
        self._wait()
        if output.is_cuda:
            torch.cuda.current_stream(output.device).synchronize()  # the other thread has a stream of its own
        self._last = self._pool.submit(stream.write, samples, output)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if error is None:
            self._wait()


def read_ahead(values: Iterator[_T]) -> Iterator[_T]:
    """Yield values, each read by another thread while the one before it is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="omniquant-read") as pool:
        end = object()
        following = pool.submit(next, values, end)
        while (value := following.result()) is not end:
            following = pool.submit(next, values, end)
            yield value  # type: ignore[misc]


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
        """Count epochs from here on: Lightning counts them over all blocks."""
        self._first_epoch, self.epoch = epoch, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before every one."""
        self.epoch = epoch - self._first_epoch

    def __call__(self) -> Tensor:
        """Return the sample indices ``[samples]`` of the current epoch."""
        if not self.shuffle:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.samples, generator=generator)


class HiddenStateBatches:
    """Iterates over inputs and targets of a block without a DataLoader, which would cost more than a small step.

    Args:
        streams: Input and targets.
        batch_size: Samples of a step; the last batch may be smaller.
        order: The order of the samples, all of them.
        share: Which of how many shares of the samples the streams hold: ``(0, 2)`` for every other one from the first
            on. Batches are those of the whole, of which only the own samples are read; there may be none.
    """

    def __init__(
        self, streams: tuple[HiddenStates, ...], batch_size: int, order: BatchOrder, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.streams = streams
        self.batch_size = batch_size
        self.sampler = order
        self._share, self._shares = share
        self._first = self._done = 0

    def state_dict(self) -> dict[str, int]:
        """Return how far the current epoch is; Lightning keeps it in checkpoints."""
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next epoch begin where another one was."""
        self._first = state["done"]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.sampler.samples / self.batch_size)

    def samples_of(self, number: int) -> int:
        """Return how many samples a batch has in all shares, by its position in the epoch."""
        return min(self.batch_size, self.sampler.samples - number * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches in float32 on the device, read by another thread while the one before is used if need be."""
        first, self._first = self._first, 0
        order = self.sampler().split(self.batch_size)[first:]
        batches = (self._read(self._own(indices)) for indices in order)
        is_direct = all(stream.is_direct for stream in self.streams)
        for number, batch in enumerate(batches if is_direct else read_ahead(batches), start=first + 1):
            self._done = number
            yield batch

    def _own(self, indices: Tensor) -> Tensor:
        """Return where in the streams those of some samples are that this share has."""
        return indices[indices % self._shares == self._share] // self._shares

    def _read(self, indices: Tensor) -> tuple[Tensor, ...]:
        if len(indices) == 1:
            start = int(indices)
            return tuple(stream.read(slice(start, start + 1)) for stream in self.streams)
        return tuple(stream.read(indices) for stream in self.streams)
