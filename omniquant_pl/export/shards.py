"""Writes a safetensors checkpoint in shards without ever holding more than one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from omniquant_pl.checkpoint import write_json, write_tensors

__all__ = ["ShardWriter"]


class ShardWriter:
    """Takes tensors in a planned order and writes a file whenever one is full.

    One file is named ``model.safetensors``; several are numbered, with an index beside them.

    Args:
        folder: Where to write.
        sizes: Bytes of every tensor that will come, by name, in that order.
        limit: Largest bytes of tensors in a file; a single larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], limit: int) -> None:
        self._folder = folder
        self._sizes = sizes
        shards = _plan(sizes, limit)
        self._file_of = {name: _file_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
        self._last_of = {names[-1] for names in shards}
        self._pending: dict[str, Tensor] = {}

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the next tensors."""
        for name, tensor in tensors:
            self._pending[name] = tensor
            if name in self._last_of:
                write_tensors(self._folder / self._file_of[name], self._pending, {"format": "pt"})
                self._pending = {}

    def finish(self) -> None:
        """Writes the index if there are several files."""
        if len(set(self._file_of.values())) > 1:
            content = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": self._file_of,
            }
            write_json(self._folder / "model.safetensors.index.json", content)


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
