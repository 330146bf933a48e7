"""Safetensors files that say what they belong to and notice every flipped bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omniquant_pl.utils.files import write_tensors

__all__ = ["DamagedFileError", "read_sealed", "write_sealed"]

_KEY = "omniquant"  # one key: the order of several is not reproducible


class DamagedFileError(ValueError):
    """A file is truncated, or holds other bytes than were written."""


def write_sealed(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors and what describes them, whole or not at all.

    Args:
        path: The file to create or replace.
        tensors: By name; they are stored in sorted order.
        content: Values that JSON holds.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(content), sort_keys=True)
    seal = {"content": text, "sha256": _digest(stored, text)}
    write_tensors(path, stored, {_KEY: json.dumps(seal, sort_keys=True)})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a file of :func:`write_sealed`.

    Returns:
        The tensors, and what describes them; ``None`` of a safetensors file that was not sealed.

    Raises:
        FileNotFoundError: If there is none.
        DamagedFileError: If its bytes are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    if _KEY not in metadata:
        if metadata not in ({}, {"format": "pt"}):
            raise DamagedFileError(f"{path} is damaged: its header is not the one that was written")
        return tensors, None
    try:
        seal = json.loads(metadata[_KEY])
        if seal["sha256"] != _digest(tensors, seal["content"]):
            raise ValueError("its checksum does not hold")
        return tensors, dict(json.loads(seal["content"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the tensors, and over the text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
