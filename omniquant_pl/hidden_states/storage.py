"""Where streams are kept: on the device while they fit, then in pinned host memory, then in mapped files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from omniquant_pl.hidden_states.states import HiddenStates
from omniquant_pl.spec import BudgetSpec

__all__ = ["HIDDEN_STATES_PREFIX", "MemoryBudget", "Storage", "StorageTier", "storage_tier_for"]

StorageTier = Literal["device", "host", "disk"]

HIDDEN_STATES_PREFIX = ".stream-"
"""Of the names of files that go with their streams, unless the process is killed."""

_SHARE = 0.4
"""Of the memory that is free, where no budget is stated: blocks, gradients and other programs need room as well."""


def storage_tier_for(streams_bytes: int, budget: BudgetSpec, device: torch.device, processes: int = 1) -> StorageTier:
    """Return the first place that has room.

    Args:
        streams_bytes: What all streams of a block need together.
        budget: How much may be taken.
        device: Where blocks are computed.
        processes: How many of this machine need as much, each with a device of its own.
    """
    if device.type == "cuda" and streams_bytes <= _bytes(budget.device, lambda: _free_device(device)):
        return "device"
    if processes * streams_bytes <= _bytes(budget.host, _free_host):
        return "host" if device.type == "cuda" else "device"
    return "disk"


def _bytes(gigabytes: float | None, free: Callable[[], int]) -> float:
    return _SHARE * free() if gigabytes is None else gigabytes * 1e9


def _free_device(device: torch.device) -> int:
    """Return the bytes that are free on a device, those that torch's allocator caches among them."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def _free_host() -> int:
    """Return the bytes that programs may still take; of machines that do not tell, all that is there."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class MemoryBudget:
    """What a process may take for streams."""

    device: torch.device
    """Where blocks are computed."""
    folder: Path
    """For files, if there are any; of this process alone."""
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    """How much may be taken."""
    processes: int = 1
    """How many of this machine need as much, each with a device of its own."""

    def storage(self, numbers: int, dtype: torch.dtype = torch.float32, keeps: bool = False) -> Storage:
        """Return the first place that has room for so many numbers, of all streams that there are at once.

        Args:
            numbers: How many.
            dtype: What they are stored in.
            keeps: As of :class:`Storage`.
        """
        place = storage_tier_for(numbers * dtype.itemsize, self.budget, self.device, self.processes)
        return Storage(place, dtype, self.device, self.folder, keeps)


class Storage:
    """Makes room for streams.

    Args:
        place: Where.
        dtype: What they are stored in.
        device: Where they are computed with.
        folder: Where files go.
        keeps: Whether they have names, so that some can be kept; others go with the process, however it ends.
    """

    def __init__(
        self, place: StorageTier, dtype: torch.dtype, device: torch.device, folder: Path, keeps: bool = True
    ) -> None:
        self.place = place
        self.dtype = dtype
        self.device = device
        self.folder = folder
        self._keeps = keeps

    def empty(self, shape: torch.Size | tuple[int, ...]) -> HiddenStates:
        """Return a stream that has not been written yet, for hidden states ``[samples, tokens, channels]``.

        Raises:
            OSError: If there is no room on the disk.
        """
        if self.place == "device":
            return HiddenStates(torch.empty(shape, dtype=self.dtype, device=self.device), self.device)
        if self.place == "host":
            return HiddenStates(torch.empty(shape, dtype=self.dtype, pin_memory=True), self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=HIDDEN_STATES_PREFIX, dir=self.folder)
        try:
            _allocate(descriptor, max(1, torch.Size(shape).numel() * self.dtype.itemsize))
        except OSError:
            Path(name).unlink()
            raise
        finally:
            os.close(descriptor)
        stream = self.open(Path(name), shape)
        if not self._keeps:
            Path(name).unlink()  # the mapping holds on to the file
        return stream

    def open(self, path: Path, shape: torch.Size | tuple[int, ...]) -> HiddenStates:
        """Return the stream in a file, which goes with it unless it is kept."""
        count = torch.Size(shape).numel()
        values = torch.from_file(str(path), shared=True, size=count, dtype=self.dtype).view(shape)
        return HiddenStates(values, self.device, path)


def _allocate(descriptor: int, size: int) -> None:
    """Take room now: a mapped file that finds none later ends the process without a word."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
