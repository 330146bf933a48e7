"""HiddenStatePair in files that outlive the process, so that a calibration goes on without computing them again."""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from omniquant_pl.hidden_states.states import HiddenStatePair, HiddenStates
from omniquant_pl.hidden_states.storage import Storage
from omniquant_pl.utils.files import write_json

__all__ = ["PersistedHiddenStates"]

_log = logging.getLogger(__name__)
_NAMES = ("full_precision", "quantized")


class PersistedHiddenStates:
    """Keeps both streams in front of a block, if they are on the disk anyway.

    Args:
        storage: Where streams are kept.
        fingerprint: What the calibration belongs to.
    """

    def __init__(self, storage: Storage, fingerprint: dict[str, str]) -> None:
        self._storage = storage
        self._fingerprint = fingerprint
        self._folder = storage.folder
        self._index = storage.folder / "streams.json"

    def keep(self, position: int, streams: HiddenStatePair) -> None:
        """Keep the streams in front of a block, in the place of those that were kept before."""
        if self._storage.place != "disk" or streams.are_equal:
            return
        files = {}
        for name in _NAMES:
            stream: HiddenStates = getattr(streams, name)
            path = self._folder / f"{position:05d}.{name}.bin"
            stream.keep_as(path)
            files[name] = {"file": path.name, "crc32": _flushed_checksum(path)}
        content = {
            "position": position,
            "shape": list(streams.quantized.shape),
            "dtype": str(self._storage.dtype),
            "fingerprint": self._fingerprint,
            "files": files,
        }
        write_json(self._index, {"content": content, "crc32": _checksum_of(content)})
        kept = {entry["file"] for entry in files.values()}
        for path in self._folder.glob("*.bin"):
            if path.name not in kept:
                path.unlink()

    def restore(self, last: int) -> tuple[int, HiddenStatePair] | None:
        """Return the streams that are kept and in front of which block, at most one; ``None`` if there are none."""
        content = self._read_index()
        if self._storage.place != "disk" or not content or content["position"] > last:
            return None
        if content["fingerprint"] != self._fingerprint or content["dtype"] != str(self._storage.dtype):
            return None
        shape = tuple(content["shape"])
        size = torch.Size(shape).numel() * self._storage.dtype.itemsize
        opened = []
        for name in _NAMES:
            path, expected = self._folder / content["files"][name]["file"], content["files"][name]["crc32"]
            if not path.is_file() or path.stat().st_size != size or _flushed_checksum(path) != expected:
                _log.warning("%s is damaged; what it held is computed again", path)
                return None
            stream = self._storage.open(path, shape)
            stream.keep_as(path)
            opened.append(stream)
        return content["position"], HiddenStatePair(*opened)

    def remove(self) -> None:
        """Delete what is kept, when the calibration is finished."""
        for path in self._folder.glob("*.bin") if self._folder.is_dir() else ():
            path.unlink()
        self._index.unlink(missing_ok=True)

    def _read_index(self) -> dict[str, Any]:
        """Return the description of what is kept, empty where there is none or it is damaged."""
        try:
            found = json.loads(self._index.read_text(encoding="utf-8"))
            content: dict[str, Any] = found["content"]
            if found["crc32"] != _checksum_of(content):
                raise ValueError("its checksum does not hold")
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, OSError) as error:
            _log.warning("%s is damaged (%s); the streams are computed again", self._index, error)
            return {}
        return content


def _checksum_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _flushed_checksum(path: Path) -> int:
    """CRC-32 of a file, after its bytes are on the disk."""
    checksum = 0
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        while part := file.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
    return checksum
