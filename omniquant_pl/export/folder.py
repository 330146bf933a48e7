"""What every exported folder has besides weights, and how it appears whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniquant_pl.checkpoint.hub_files import LEGAL_FILES, TEMPLATES, TOKENIZER_FILES
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export.remote_code import RemoteCode
from omniquant_pl.run.folder import is_export

__all__ = ["atomic_directory", "check_target", "copy_auxiliary_files"]

_COMPANIONS = (
    "generation_config.json",
    "*processor_config.json",
    *TOKENIZER_FILES,
    *LEGAL_FILES,
)


def copy_auxiliary_files(source: Path, target: Path, code: RemoteCode) -> None:
    """Copy tokenizer, image processor, generation configuration, chat templates and licence of a model folder.

    Args:
        source: The original model's folder.
        target: The exported folder.
        code: Python code of the original; what is copied names no other.
    """
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                if path.name.endswith("_config.json"):
                    code.copy_json(path, copy)
                else:
                    shutil.copyfile(path, copy)
    code.copy_files(target)


def check_target(target: Path, run: Path, source: Path, key: str = "output", is_replaced: bool = True) -> None:
    """Refuse a folder that an export must not take the place of, as all that is there would be gone.

    Args:
        target: The folder to create or replace.
        run: The folder of the run that is exported.
        source: The original model's folder.
        key: The setting that the target is from.
        is_replaced: Whether what is there goes; not if it is moved away before.

    Raises:
        ConfigurationError: If the target holds the run or the original model, lies in the latter, or holds anything
            but an earlier export.
    """
    place, origin = target.resolve(), source.resolve()
    if run.resolve().is_relative_to(place):
        reason = f"is or contains the folder of the run, {run}"
    elif origin.is_relative_to(place) or place.is_relative_to(origin):
        reason = f"is, contains or lies in the folder of the original model, {source}"
    elif is_replaced and place.exists() and not _is_replaceable(place):
        reason = "holds something else than an earlier export"
    else:
        return
    accepted = "an export replaces the whole folder, so take one that is new or empty, or holds an earlier export alone"
    raise ConfigurationError(key, f"{target} {reason}; {accepted}")


def _is_replaceable(place: Path) -> bool:
    """Return whether it is an empty folder or an export, which has no folders in it but one of chat templates."""
    if not place.is_dir():
        return False
    entries = list(place.iterdir())
    if any(path.is_dir() and not _holds_templates(path) for path in entries):
        return False
    return not entries or is_export(place)


def _holds_templates(folder: Path) -> bool:
    """Return whether a folder in an export is that of chat templates, with nothing else in it."""
    if folder.name != TEMPLATES or folder.is_symlink():
        return False
    return all(path.suffix == ".jinja" and path.is_file() for path in folder.iterdir())


@contextmanager
def atomic_directory(target: Path, run: Path, source: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the target's place only if nothing went wrong.

    Args:
        target: The folder to create or replace.
        run: The folder of the run that is exported.
        source: The original model's folder.

    Raises:
        ConfigurationError: If it cannot be made there, or its place must not be taken.
    """
    check_target(target, run, source)
    target = target.resolve()  # of a link, what it leads to is replaced; and "." has a name
    filling, previous = (target.with_name(f".{target.name}.{state}") for state in ("filling", "previous"))
    shutil.rmtree(filling, ignore_errors=True)
    try:
        filling.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError("output", f"{target} cannot be made: {error.strerror}") from error
    try:
        yield filling
        shutil.rmtree(previous, ignore_errors=True)
        if target.exists():
            target.replace(previous)
        try:
            filling.replace(target)
        except OSError:
            if previous.exists():
                previous.replace(target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(filling, ignore_errors=True)
