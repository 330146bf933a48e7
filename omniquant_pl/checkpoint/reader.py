"""Reads a safetensors checkpoint tensor by tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniquant_pl.checkpoint.pointers import check_not_pointer
from omniquant_pl.checkpoint.weight_files import shards_of, weights_file
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import StoredPart

__all__ = ["Checkpoint", "TensorInfo"]

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor.

    Attributes:
        shape: Its shape.
        dtype: Its dtype in safetensors' words, for example ``BF16``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def element_bytes(self) -> int:
        """Bytes of one value as it is stored."""
        return _DTYPE_BYTES.get(self.dtype, 1)

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point values of 16 bit or more."""
        return self.dtype in _FLOATS

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Checkpoint:
    """The weights of a model folder, in one safetensors file or in shards with an index.

    Its tensors have the names that they are stored under, or those of a :meth:`view`.

    Args:
        folder: The model folder.
        key: The setting that led here, which errors name.
        weights: ``transformers_weights`` of the configuration: the file to read instead of the usual ones.

    Raises:
        ConfigurationError: If the folder has no readable safetensors weights.
    """

    def __init__(self, folder: Path, key: str = "model.path", weights: object = None) -> None:
        self.folder = folder
        self._key = key
        self._file_of = self._index(weights)
        self._parts = {name: StoredPart(name) for name in self._file_of}

    def _index(self, weights: object) -> dict[str, str]:
        """Read which file holds a tensor, by the tensor's name.

        Shards hold what is in them, whatever the index says, and of a name that two have the later one counts, as in
        transformers. A name that none has is still one of the checkpoint's, so that it is missed when it is read.
        """
        path = weights_file(self.folder, self._key, weights)
        promised = shards_of(path, self._key) if path.name.endswith(".json") else {}
        found = dict(promised)
        for file_name in sorted(set(promised.values())) or [path.name]:
            with self._open(file_name) as file:
                found |= dict.fromkeys(file.keys(), file_name)
        return found

    def _open(self, name: str) -> safe_open:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            check_not_pointer(self.folder / name, self._key)
            raise ConfigurationError(self._key, f"{self.folder / name} cannot be read: {error}") from error

    def view(self, parts: Mapping[str, StoredPart]) -> Checkpoint:
        """Return the same checkpoint with other tensors, which are made of what is stored.

        Args:
            parts: Where the tensors are, by their names in the view.
        """
        view = copy.copy(self)
        view._parts = dict(parts)
        return view

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same checkpoint with other names for some of its tensors.

        Args:
            names: The new names by those that they replace.
        """
        return self.view({names.get(name, name): part for name, part in self._parts.items()})

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of that name."""
        return name in self._parts

    def names(self) -> tuple[str, ...]:
        """Return all tensor names, sorted."""
        return tuple(sorted(self._parts))

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor or what it is made of; the folder, if none does."""
        part = self._parts.get(name, StoredPart(name))
        return self.folder / self._file_of.get(part.stored or "", "")

    def read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Read some tensors in the dtype they are stored in, each file opened and each stored tensor read once.

        Raises:
            ConfigurationError: If one is missing or its file cannot be read.
        """
        for name in names:
            if name not in self._parts:
                raise ConfigurationError(self._key, f"{self.folder} has no tensor {name}")
        parts = {name: self._parts[name] for name in names}
        stored = self._read_stored({part.stored for part in parts.values() if part.stored is not None})
        return {
            name: torch.zeros(part.zeros) if part.stored is None else stored[part.stored][part.index]
            for name, part in parts.items()
        }

    def _read_stored(self, names: set[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file_name in sorted({self._file_of[name] for name in names}):
            with self._open(file_name) as file:
                tensors |= {name: self._get(file, name) for name in names if self._file_of[name] == file_name}
        return tensors

    def _get(self, file: safe_open, name: str) -> Tensor:
        try:
            return cast(Tensor, file.get_tensor(name))  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            path = self.folder / self._file_of[name]
            raise ConfigurationError(self._key, f"{path} has no tensor {name}") from error

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every name and tensor, one at a time."""
        for name in self.names():
            yield name, self.read((name,))[name]

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for file_name in sorted(set(self._file_of.values())):
            with self._open(file_name) as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    view = file.get_slice(name)
                    infos[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype())
        return infos

    def describe(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor, without reading it.

        Raises:
            ConfigurationError: If the checkpoint, or the file that should hold it, has no such tensor.
        """
        part = self._parts.get(name, StoredPart(name))
        if part.stored is None:
            return TensorInfo(part.zeros, "F32")
        if part.stored not in self._infos:
            path = self.folder / self._file_of.get(part.stored, "")
            raise ConfigurationError(self._key, f"{path} has no tensor {part.stored}")
        info = self._infos[part.stored]
        if not part.index:
            return info
        return TensorInfo(tuple(torch.empty(info.shape, device="meta")[part.index].shape), info.dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name, without reading them."""
        return {name: self.describe(name).shape for name in self.names()}

    def verify(self) -> None:
        """Read everything that is stored once and refuse what no calibration can mend.

        Raises:
            ConfigurationError: If a tensor has a value that is not finite in float32; it names the tensor.
        """
        for name in sorted(self._file_of):
            tensor = self._read_stored({name})[name]
            if self._infos[name].is_float:
                self._check_finite(name, tensor)

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse values that are not finite, or of float64 not finite in float32, which all is computed in."""
        if tensor.dtype == torch.float64:
            tensor = tensor.to(torch.float32)
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            raise ConfigurationError(self._key, f"{self.folder}: {count} values of {name} are NaN or infinite")
