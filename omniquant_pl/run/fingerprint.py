"""What a calibration belongs to: its settings, the files of the model, the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["differing_parts", "digest_of", "fingerprint", "model_digest"]

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint(settings: Mapping[str, Any], model: Path, tokens: Tensor) -> dict[str, str]:
    """Return a digest for each of the things that decide what a calibration learns.

    Args:
        settings: The deciding settings by name; what JSON does not hold counts as its text.
        model: The model folder. Of its weights the size, the header and samples count, as reading hundreds of gigabytes
            would take minutes at every start.
        tokens: The calibration set ``[samples, tokens]``.
    """
    return {
        "settings": _digest(json.dumps(dict(settings), sort_keys=True, default=str).encode()),
        "model": model_digest(model),
        "data": _digest(str(list(tokens.shape)).encode(), tokens.long().contiguous().numpy().tobytes()),
    }


def model_digest(folder: Path) -> str:
    """Return the digest of a model folder that :func:`fingerprint` holds."""
    return _digest(*(part for path in _model_files(folder) for part in (path.name.encode(), _summary(path))))


def digest_of(tokens: Mapping[str, Tensor]) -> str:
    """Return the digest of sets of tokens ``[windows, length]`` and their names, whatever their order."""
    parts = ((f"{name} {list(found.shape)}", found.long().contiguous().numpy()) for name, found in tokens.items())
    return _digest(*(part for name, array in sorted(parts) for part in (name.encode(), array.tobytes())))


def differing_parts(own: Mapping[str, str], other: Mapping[str, Any]) -> list[str]:
    """Return which parts of two fingerprints differ, in words for a message."""
    words = {"settings": "settings", "model": "model files", "data": "calibration tokens"}
    return [words[part] for part in own if other.get(part) != own[part]]


def _model_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / "config.json"])


def _summary(path: Path) -> bytes:
    """Size, first bytes, among them the header of a safetensors file, and samples all over the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 20)
        parts = [str(size).encode(), head]
        for number in range(_SAMPLES):
            file.seek(size * number // _SAMPLES)
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
