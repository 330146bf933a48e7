"""Whether factors that a model starts from were learned for that model."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError

__all__ = ["check_rotation", "rotation_of", "warn_of_another_model"]

_log = logging.getLogger(__name__)


def rotation_of(source: SourceModel) -> dict[str, Any] | None:
    """Return the rotation of a model as files say it, ``None`` of one that is not rotated."""
    return None if source.rotation is None else asdict(source.rotation)


def check_rotation(path: Path, rotation: Any, source: SourceModel) -> None:
    """Refuse factors that were learned for another rotation.

    Args:
        path: Where they are.
        rotation: What they were learned for, as :func:`rotation_of` says it.
        source: The model that starts from them.

    Raises:
        ConfigurationError: If the rotations differ.
    """
    if rotation != rotation_of(source):
        message = f"{path} has learned for another model.rotation, {rotation}"
        raise ConfigurationError("model.parameters", message)


def warn_of_another_model(path: Path, other: Any, source: SourceModel) -> None:
    """Warn that factors were learned for another model, which is meant where this one was tuned from it."""
    message = "model.parameters: %s has learned for another model, %s; its factors become the start of %s"
    _log.warning(message, path, other, source.folder)
