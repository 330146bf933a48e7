"""Checkpoints whose tensors stand elsewhere than the model looks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Conversion",
    "Converted",
    "Shapes",
    "StoredPart",
    "conversion_of",
    "converted_families",
    "register_conversion",
]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of stored tensors by name."""


@dataclass(frozen=True)
class StoredPart:
    """What stands in a checkpoint for a tensor.

    Attributes:
        stored: Name of the stored tensor that it is, or is part of; ``None`` where nothing is stored and zeros stand
            for it.
        index: What is taken of the stored tensor; nothing for all of it.
        zeros: Shape of the zeros.
    """

    stored: str | None
    index: tuple[int | slice | Tensor, ...] = ()
    zeros: tuple[int, ...] = ()


class Converted(NamedTuple):
    """A checkpoint seen as one of another family.

    Attributes:
        config: What ``config.json`` of that family holds.
        tensors: Where that family's tensors are, by name.
    """

    config: dict[str, Any]
    tensors: dict[str, StoredPart]


Conversion = Callable[[Mapping[str, Any], Shapes], Converted]
"""Takes the content of ``config.json`` and the shapes of all stored tensors.

It raises :class:`omniquant_pl.errors.ConfigurationError` where they do not fit.
"""

_CONVERSIONS: dict[str, Conversion] = {}


def register_conversion(model_type: str, conversion: Conversion) -> None:
    """Make known how checkpoints of a family that transformers lacks are opened."""
    _CONVERSIONS[model_type] = conversion


def converted_families() -> tuple[str, ...]:
    """Return every ``model_type`` whose checkpoints are opened as another family's."""
    return tuple(_CONVERSIONS)


def conversion_of(model_type: str) -> Conversion | None:
    """Return how checkpoints of a family are opened as another's, ``None`` where they are opened as they are."""
    return _CONVERSIONS.get(model_type)
