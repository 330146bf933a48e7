"""What an exported folder keeps of the original's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["config_of"]

_OF_THE_ORIGINAL = ("_name_or_path", "quantization_config", "dtype", "torch_dtype")
"""Where it was loaded from, how it was stored, and the two names of the dtype."""


def config_of(source: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """Return a configuration that says nothing of the original's files.

    Sections for the parts of a model have dtypes of their own, which a loader could take for the model's.

    Args:
        source: The original's ``config.json``.
        dtype: What the model is to be loaded in; ``None`` for what the original says.
    """
    stated = {**source, "dtype": dtype or source.get("dtype") or source.get("torch_dtype")}
    if stated["dtype"] is None:
        del stated["dtype"]
    return {key: _kept(value) for key, value in stated.items() if key == "dtype" or key not in _OF_THE_ORIGINAL}


def _kept(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _kept(inner) for key, inner in value.items() if key not in _OF_THE_ORIGINAL}
