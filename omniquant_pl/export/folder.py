"""What every exported folder has besides weights, and how it appears whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["copy_companions", "whole_folder"]

_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "LICENSE*",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, image processor, generation configuration, chat template and licence of a model folder."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to fill, which takes the target's place only if nothing went wrong.

    Raises:
        ConfigurationError: If it cannot be made there.
    """
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
