"""A packed folder from disk: what its JSON and its headers say is checked before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.checkpoint import Checkpoint
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.quant.narrowing import NarrowDtypeError
from omniquant_pl.runtime.scheme import read_scheme
from omniquant_pl.runtime.skeleton import Slot
from omniquant_pl.spec import Scheme

__all__ = ["PackedFolder"]

_KEY = "packed"
_DTYPES = {torch.int32: "I32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_READ_AT_ONCE = 8


class PackedFolder:
    """An exported folder, of which only JSON and headers have been read.

    Args:
        folder: The folder.

    Attributes:
        config: What ``config.json`` says of the model.
        scheme: What it says of the quantization.

    Raises:
        ConfigurationError: If a file is missing or damaged; it names the file.
    """

    config: Mapping[str, Any]
    scheme: Scheme

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.json"
        if not folder.is_dir():
            command = f"export --format packed --output {folder}"
            message = f"there is no packed model in {folder}; this command writes one: {command}"
            raise ConfigurationError(_KEY, message)
        try:
            content = dict(json.loads(self.config_file.read_text(encoding="utf-8")))
            self.scheme = read_scheme(content.pop("quantization_config", None))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigurationError(_KEY, f"{self.config_file} is not that of a packed model: {error}") from error
        self.config = content
        self._checkpoint = Checkpoint(folder, _KEY)
        self.names = frozenset(self._checkpoint.names())
        stored = sum(_bytes(self._checkpoint, name) for name in self.names)
        self._check_sizes(self.config, stored)

    def _check_sizes(self, section: Mapping[str, Any], stored: int) -> None:
        """Refuse a model that cannot be what is stored: to build it would take memory or time without end."""
        for key, value in section.items():
            if isinstance(value, Mapping):
                self._check_sizes(value, stored)
            elif isinstance(value, int) and "head" not in key and key.startswith("num_") and value > len(self.names):
                raise self._refusal(f"{key} is {value}, but {len(self.names)} tensors are stored")
            elif isinstance(value, int) and key.endswith(("_size", "_dim", "_heads")) and value > stored:
                raise self._refusal(f"{key} is {value}, but {stored} bytes are stored")

    def _refusal(self, message: str) -> ConfigurationError:
        return ConfigurationError(_KEY, f"{self.config_file}: {message}")

    def check_exclusive(self, slots: Mapping[str, Slot]) -> None:
        """Compare the headers with what the model needs, and read no tensor.

        Raises:
            ConfigurationError: If a tensor has another shape or dtype; it names the file and the tensor.
        """
        for name, slot in slots.items():
            found = self._checkpoint.describe(name)
            where = f"{self._checkpoint.path_of(name)}: {name}"
            if found.shape != slot.shape:
                raise ConfigurationError(_KEY, f"{where} has shape {found.shape}, not {slot.shape}")
            if slot.dtype is None and not found.is_float:
                raise ConfigurationError(_KEY, f"{where} is stored as {found.dtype}, not as a float of 16 bit or more")
            if slot.dtype is not None and found.dtype != _DTYPES[slot.dtype]:
                message = f"{where} is stored as {found.dtype}, not as {_DTYPES[slot.dtype]}"
                raise ConfigurationError(_KEY, message)

    def fill(self, slots: Mapping[str, Slot]) -> None:
        """Read tensors, a few at a time, to where they go.

        Raises:
            ConfigurationError: If one has values that no model has; it names the file and the tensor.
        """
        for name, tensor in self._tensors(tuple(slots)):
            self._put(name, tensor, slots[name])

    def _put(self, name: str, tensor: Tensor, slot: Slot) -> None:
        try:
            slot.put(tensor)
        except NarrowDtypeError:
            raise
        except ValueError as error:
            raise ConfigurationError(_KEY, f"{self._checkpoint.path_of(name)}: {name} {error}") from error

    def _tensors(self, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        for begin in range(0, len(names), _READ_AT_ONCE):
            yield from self._checkpoint.read(names[begin : begin + _READ_AT_ONCE]).items()


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    found = checkpoint.describe(name)
    return found.elements * found.element_bytes
