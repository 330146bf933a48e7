"""The formats by name, found in this package, and the refusal of what a format cannot hold."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from omniquant_pl import export as package
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export.format import Export, StorageDtype
from omniquant_pl.model import OmniQuantModel

__all__ = ["FORMATS", "FormatName", "formats_help", "open_format"]


def _formats() -> Iterator[type[Export]]:
    """Return every format that a module of this package defines, so that a new one is one new file."""
    for found in pkgutil.iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{found.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Export) and not inspect.isabstract(kind) and kind.__module__ == module.__name__:
                yield kind


FORMATS: dict[str, type[Export]] = {
    kind.name: kind for kind in sorted(_formats(), key=lambda kind: (kind.name != "hf", kind.name))
}
"""Every format by its name, the default first."""

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


def formats_help() -> str:
    """Return what each format is, for ``--help``."""
    return "; ".join(f"{name}: {kind.description}" for name, kind in FORMATS.items())


def open_format(
    name: str,
    model: OmniQuantModel,
    dtype: StorageDtype | None = None,
    shard_bytes: int = 5_000_000_000,
    section: str = "export.",
) -> Export:
    """Return a format that can hold a model.

    Args:
        name: Its name.
        model: What it has to hold; its source is opened.
        dtype: Storage of the tensors that are not quantized; ``None`` for what holds them exactly.
        shard_bytes: Largest size of one file.
        section: What the settings' names begin with in errors; see :class:`Export`.

    Raises:
        ConfigurationError: If it cannot hold the model exactly; it names the formats that can. Or a value is out of
            range.
    """
    if shard_bytes < 1:
        raise ConfigurationError(f"{section}shard_bytes", f"{shard_bytes} is not a positive number of bytes")
    export = FORMATS[name](dtype, shard_bytes, section)
    reason = export.refusal(model)
    if reason is None:
        return export
    able = [other for other, kind in FORMATS.items() if kind(dtype, shard_bytes).refusal(model) is None]
    message = f"{name} cannot hold this model exactly: {reason}; formats that can: {', '.join(able)}"
    raise ConfigurationError(f"{section}format", message)
