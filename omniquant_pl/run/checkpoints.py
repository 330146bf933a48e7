"""Lightning checkpoints that appear whole, notice damage, and leave the one before them in place."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from omniquant_pl.utils.files import replace_file
from omniquant_pl.utils.sealed import DamagedFileError

__all__ = ["GuardedCheckpointIO", "load_latest", "previous_of"]

_log = logging.getLogger(__name__)
_MARK = b"omniquant sha256"
_TRAILER_BYTES = len(_MARK) + 32


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before the last one is."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


class GuardedCheckpointIO(TorchCheckpointIO):
    """Writes ``torch.save`` files with a checksum behind them, which ``torch.load`` does not look at.

    Args:
        stays: Tells by its content whether the last checkpoint becomes the one before; ``None``: always.
    """

    def __init__(self, stays: Callable[[dict[str, Any]], bool] | None = None) -> None:
        super().__init__()
        self._stays = stays

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)

        def write(temporary: Path) -> None:
            _save(checkpoint, temporary)
            digest = _digest(temporary, temporary.stat().st_size)
            with temporary.open("ab") as file:
                file.write(_MARK + digest)

        fresh = path.with_name(f".{path.name}.part")
        replace_file(fresh, write)
        if path.is_file() and _is_whole(path) and (self._stays is None or self._stays(self.load_checkpoint(path))):
            path.replace(previous_of(path))
        fresh.replace(path)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; tensors, numbers and texts only, whatever ``weights_only`` says.

        Raises:
            DamagedFileError: If its bytes are not those that were written.
        """
        path = Path(path)
        if not _is_whole(path):
            raise DamagedFileError(f"{path} is damaged: its checksum does not hold")
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded


def load_latest(path: Path, fits: Callable[[dict[str, Any]], bool]) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest checkpoint that can be gone on from: the last one, or the one before.

    Args:
        path: The last one.
        fits: Whether a checkpoint can be gone on from.

    Returns:
        Its path and content, ``None`` if there is none. A damaged one is reported in the log.
    """
    reader = GuardedCheckpointIO()
    for candidate in (path, previous_of(path)):
        if not candidate.is_file():
            continue
        try:
            content = reader.load_checkpoint(candidate)
        except (DamagedFileError, OSError) as error:
            _log.warning("%s; going on from what was there before it", error)
            continue
        if fits(content):
            return candidate, content
    return None


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save``, which says of a full disk that a position is unexpected."""
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free < 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _is_whole(path: Path) -> bool:
    """Return whether a checkpoint's checksum holds."""
    size = path.stat().st_size - _TRAILER_BYTES
    if size <= 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        return file.read() == _MARK + _digest(path, size)


def _digest(path: Path, size: int) -> bytes:
    """SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
    return digest.digest()
