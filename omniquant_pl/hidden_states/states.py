"""Hidden states of all samples at one place in the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HiddenStatePair", "HiddenStates"]


class HiddenStates:
    """Hidden states ``[samples, tokens, channels]``, stored where there is room, read and written in float32.

    Args:
        values: Where they are stored, in the dtype that they are stored in.
        device: Where they are computed with.
        path: The file that holds them, which goes with the stream unless it is kept.
    """

    def __init__(self, values: Tensor, device: torch.device, path: Path | None = None) -> None:
        self.values = values
        self.device = device
        self.path = path
        self._removal = None if path is None else weakref.finalize(self, path.unlink, missing_ok=True)

    @property
    def shape(self) -> torch.Size:
        """``[samples, tokens, channels]``."""
        return self.values.shape

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.values)

    @property
    def is_direct(self) -> bool:
        """Whether it is read where it is, so that no other thread needs to do it ahead of time."""
        return self.values.device == self.device and self.path is None

    def read(self, samples: slice | Tensor) -> Tensor:
        """Return some samples in float32 on the device; a slice of a stream that is there in float32 is a view."""
        part = self.values[samples if isinstance(samples, slice) else samples.to(self.values.device)]
        if self.path is not None:
            part = part.clone()  # a view would be read from the file where it is used
        if self.device.type == "cuda" and not part.is_cuda and not part.is_pinned():
            part = part.pin_memory()
        return part.to(self.device, non_blocking=True).float()

    def write(self, samples: slice, hidden: Tensor) -> None:
        """Store some samples."""
        self.values[samples].copy_(hidden)

    def parts(self, size: int = 8) -> Iterator[Tensor]:
        """Yield the samples in order, some at a time."""
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size))

    def keep_as(self, path: Path) -> None:
        """Give the stream's file a name that it keeps when the stream is gone."""
        assert self.path is not None
        assert self._removal is not None
        self._removal.detach()
        self.path = self.path.replace(path)


class HiddenStatePair:
    """Both streams in front of the current block.

    Attributes:
        full_precision: As the original model computes them.
        quantized: As the blocks that are folded already compute them.
    """

    def __init__(self, full_precision: HiddenStates, quantized: HiddenStates | None = None) -> None:
        self.full_precision = full_precision
        self.quantized = full_precision if quantized is None else quantized

    @property
    def are_equal(self) -> bool:
        """Whether nothing has been quantized yet."""
        return self.full_precision is self.quantized

    def advance(self, full_precision: HiddenStates, quantized: HiddenStates) -> None:
        """Move both streams behind the block."""
        self.full_precision, self.quantized = full_precision, quantized
