"""Factors that another run has learned, and whether it learned them for the model that is to start from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from omniquant_pl.checkpoint import SourceModel, is_hub_id, locate_model
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.initialization.origin import check_rotation, warn_of_another_model
from omniquant_pl.run.folder import RunFolder

__all__ = ["RunFactors"]


class RunFactors:
    """The factors of a finished run. A run of another model is warned of: it is meant where one was tuned from it.

    Args:
        folder: The run.
        source: The model that starts from its factors.

    Raises:
        ConfigurationError: If a block's file is missing, or the factors were learned for another rotation.
    """

    def __init__(self, folder: RunFolder, source: SourceModel) -> None:
        self._folder = folder
        settings = folder.read_config("model.parameters").get("model")
        if settings is not None:
            check_rotation(folder.path, settings.get("rotation"), source)
        missing = [index for index in range(len(source)) if not folder.factor_file(index).is_file()]
        if missing:
            path = folder.factor_file(missing[0])
            raise ConfigurationError(
                "model.parameters", f"{folder.path} is not the folder of a finished run: {path} is missing"
            )
        other = _other_model(folder, settings or {}, source)
        if other is not None:
            warn_of_another_model(folder.path, other, source)

    def origin(self, index: int) -> str:
        """Say where a block's factors are from."""
        return str(self._folder.factor_file(index))

    def load(self, index: int) -> dict[str, Tensor]:
        """Return one block's factors by name.

        Raises:
            ConfigurationError: If the file is damaged.
        """
        return self._folder.load_factors(index, "model.parameters")


def _other_model(folder: RunFolder, settings: Mapping[str, Any], source: SourceModel) -> str | None:
    """Describe the model that a run has learned for, or return ``None`` where nothing says that it is another."""
    path = settings.get("path")
    found = None if path is None else _folder_of(path)
    has_more_blocks = folder.factor_file(len(source)).is_file()
    if not has_more_blocks and (path is None or (found is not None and found.samefile(source.folder))):
        return None
    known = [] if path is None else [path]
    if has_more_blocks:
        known.append(f"with more than {len(source)} blocks")
    keys = [] if found is None else _differing_keys(found, source.folder)
    if keys:
        known.append(f"whose config.json has another {', '.join(keys)}")
    return ", ".join(known)


def _folder_of(path: str) -> Path | None:
    """Return where a model is on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        if not is_hub_id(path):
            return locate_model(path)
        cached = try_to_load_from_cache(path, "config.json")
    except ValueError:  # there is no such folder, or it cannot be the name of a repository
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _differing_keys(*folders: Path) -> list[str]:
    """Keys whose values differ in the config.json of two folders; none where one cannot be read."""
    try:
        first, second = (dict(json.loads((path / "config.json").read_text(encoding="utf-8"))) for path in folders)
    except (OSError, TypeError, ValueError):
        return []
    return sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
