"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["finite", "replace_file", "write_json", "write_tensors", "write_text"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file through a temporary one in the same folder: flush to disk, rename, flush the folder.

    Args:
        path: The file to create or replace; its folder is created.
        write: Writes the content to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        os.close(descriptor)
        write(temporary)
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file."""
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, indented by two spaces, keys in the given order; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Return what JSON can hold of a content: numbers that are not finite become ``None``."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Args:
        path: The file to create or replace.
        tensors: What it holds; stored contiguous, in sorted order.
        metadata: At most one key, since the order of several is not reproducible.
    """
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    replace_file(path, lambda temporary: save_file(ordered, temporary, dict(metadata or {})))
