"""Git LFS pointers: what a clone without Git LFS has in the place of large files."""

from __future__ import annotations

from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["POINTER", "check_not_pointer", "is_pointer"]

POINTER = "is a Git LFS pointer, not the file itself; run git lfs pull in its repository"

_START = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Tell a Git LFS pointer by its first line; a file that is missing or cannot be read is none."""
    try:
        with path.open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:
        return False


def check_not_pointer(path: Path, key: str) -> None:
    """Refuse a Git LFS pointer.

    Args:
        path: The file.
        key: The setting that led here.

    Raises:
        ConfigurationError: If the file is a pointer.
    """
    if is_pointer(path):
        raise ConfigurationError(key, f"{path} {POINTER}")
