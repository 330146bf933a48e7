"""Writes a safetensors checkpoint in shards, tensor by tensor as they come."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from omniquant_pl.runtime.codec import Stored
from omniquant_pl.utils.files import write_json

__all__ = ["ShardWriter", "Stored"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls dtypes."""

_ALIGNMENT = 8


class ShardWriter:
    """Takes tensors in a planned order; no more than one of them is in memory.

    One file is named ``model.safetensors``; several are numbered, with an index beside them.

    Args:
        folder: Where to write.
        planned: Shape and dtype of every tensor that will come, by name, in that order.
        limit: Largest bytes of tensors in a file; a single larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, planned: Mapping[str, Stored], limit: int) -> None:
        self._folder = folder
        self._planned = planned
        shards = _plan({name: _bytes(stored) for name, stored in planned.items()}, limit)
        self._file_of = {name: _file_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
        self._first_of = {names[0]: names for names in shards if names}
        self._expected = iter(planned)
        self._file: BinaryIO | None = None

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the next tensors.

        Raises:
            ValueError: If one is not what was planned to come next.
        """
        for name, tensor in tensors:
            if name != (expected := next(self._expected, None)):
                raise ValueError(f"{name} comes where {expected} was planned")
            shape, dtype = self._planned[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {dtype} {shape}")
            if name in self._first_of:
                self._start(self._folder / self._file_of[name], self._first_of[name])
            assert self._file is not None
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _start(self, path: Path, names: list[str]) -> None:
        """Begin a file: the length of the header, the header, then the tensors one after another."""
        self._close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            shape, dtype = self._planned[name]
            start, end = end, end + _bytes((shape, dtype))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Write the index if there are several files.

        Raises:
            ValueError: If a tensor that was planned has not come.
        """
        missing = next(self._expected, None)
        if missing is not None:
            raise ValueError(f"{missing} was planned and has not come")
        self._close()
        if len(set(self._file_of.values())) > 1:
            content = {
                "metadata": {"total_size": sum(_bytes(stored) for stored in self._planned.values())},
                "weight_map": self._file_of,
            }
            write_json(self._folder / "model.safetensors.index.json", content)


def _bytes(stored: Stored) -> int:
    shape, dtype = stored
    return math.prod(shape) * dtype.itemsize


def _plan(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
