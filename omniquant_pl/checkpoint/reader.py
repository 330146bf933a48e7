"""Reads a safetensors checkpoint tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniquant_pl.errors import ConfigurationError

__all__ = ["Checkpoint"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The weights of a model folder, in one safetensors file or in shards with an index.

    Args:
        folder: The model folder.

    Raises:
        ConfigurationError: If the folder has no readable safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._index()

    def _index(self) -> dict[str, str]:
        if (self.folder / _INDEX).is_file():
            weight_map: dict[str, str] = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({name for name in weight_map.values() if not (self.folder / name).is_file()})
            if missing:
                raise ConfigurationError("model.path", f"{self.folder / _INDEX} names {missing[0]}, which is missing")
            return weight_map
        if (self.folder / _SINGLE).is_file():
            with self._open(_SINGLE) as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        raise ConfigurationError(
            "model.path",
            f"{self.folder} holds neither {_SINGLE} nor {_INDEX}; pickled weights are not read: convert them with "
            "transformers' save_pretrained",
        )

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigurationError("model.path", f"{self.folder / name} cannot be read: {error}") from error

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self._file_of

    def names(self) -> tuple[str, ...]:
        """Returns all tensor names, sorted."""
        return tuple(sorted(self._file_of))

    def read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Reads some tensors in the dtype they are stored in, each file opened once.

        Raises:
            ConfigurationError: If one is missing.
        """
        for name in names:
            if name not in self._file_of:
                raise ConfigurationError("model.path", f"{self.folder} has no tensor {name}")
        tensors: dict[str, Tensor] = {}
        for file_name in sorted({self._file_of[name] for name in names}):
            with self._open(file_name) as file:
                tensors |= {name: file.get_tensor(name) for name in names if self._file_of[name] == file_name}
        return {name: tensors[name] for name in names}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every name and tensor, one at a time."""
        for name in self.names():
            yield name, self.read((name,))[name]

    def elements(self, name: str) -> int:
        """Number of values of a tensor, without reading it."""
        with self._open(self._file_of[name]) as file:
            return math.prod(file.get_slice(name).get_shape())

    def verify(self) -> None:
        """Reads everything once and refuses what no calibration can mend.

        Raises:
            ConfigurationError: If a tensor has a value that is not finite; it names the tensor.
        """
        for name, tensor in self:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ConfigurationError("model.path", f"{self.folder}: {count} values of {name} are NaN or infinite")

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum((self.folder / name).stat().st_size for name in sorted(set(self._file_of.values())))
