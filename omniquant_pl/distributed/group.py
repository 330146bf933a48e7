"""Processes that calibrate the same block: what they add up, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from omniquant_pl.errors import CalibrationError, ConfigurationError

__all__ = ["Group", "RemoteRankError"]

_T = TypeVar("_T")


class RemoteRankError(ConfigurationError):
    """What another process of the group has failed with; that one says it.

    Args:
        message: Its error.
    """

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)
        self.key = ""


class Group:
    """Some processes, each with a share of the samples. Of one process everything is its own result.

    Args:
        rank: Position of this process.
        size: Number of processes.
        handle: The process group of torch, if there are others.
    """

    def __init__(self, rank: int = 0, size: int = 1, handle: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._handle = handle

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all of them have."""
        return self.rank == 0

    def share(self, values: Tensor) -> Tensor:
        """Return this process's samples of ``[samples, ...]``: every ``size``-th, so that batches divide evenly."""
        return values[self.rank :: self.size]

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, the same bits in all of them."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def minimum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its least values."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its greatest values."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, operation, group=self._handle)
        return tensor

    def total(self, values: Iterable[float]) -> list[float]:
        """Return the sums of some numbers over the processes, in float64."""
        return self.sum(torch.tensor(list(values), dtype=torch.float64)).tolist()

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        return number if self.size == 1 else int(self.maximum(torch.tensor(number)))

    def least(self, number: int) -> int:
        """Return the least of the processes' numbers."""
        return -self.largest(-number)

    def any(self, value: bool) -> bool:
        """Return whether it is true in any process."""
        return bool(self.largest(int(value)))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, group=self._handle, group_src=0)

    def concatenate(self, rows: Tensor) -> Tensor:
        """Return the rows ``[any, columns]`` of all processes, in the order of the processes."""
        if self.size == 1:
            return rows
        counts = self.sum(torch.eye(self.size, dtype=torch.long)[self.rank] * len(rows)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group=self._handle)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def collect(self, value: _T) -> list[_T]:
        """Return a small value of every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._handle)
        return found

    def gather(self, values: Tensor, to: int) -> list[Tensor] | None:
        """Return the tensors of all processes, of one shape, in one of them, and ``None`` in the others."""
        if self.size == 1:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.size)] if self.rank == to else None
        dist.gather(values.contiguous(), found, group=self._handle, group_dst=to)
        return found

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all processes refuse what one of them refuses inside; that one says why.

        Raises:
            ConfigurationError: As inside.
            RemoteRankError: If it was another process.
        """
        error: ConfigurationError | CalibrationError | None = None
        try:
            yield
        except (ConfigurationError, CalibrationError) as caught:
            error = caught
        messages = self.collect(None if error is None else str(error))
        first = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if first is None:
            return
        if error is not None and first == self.rank:
            raise error
        raise RemoteRankError(str(messages[first]))
