"""Settings from Python: any nesting, numbers and paths of other libraries, as values that YAML has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniquant_pl.errors import ConfigurationError

__all__ = ["nested", "plain_settings"]

_OWN = {
    "config": "give a preset or a path as scheme",
    "ckpt_path": "quantize() starts a run of its own; resume one by the command line",
    "model.path": "the model is the first argument",
    "trainer.default_root_dir": "give the folder as output",
    "export.format": "quantize() loads the hf format; write others by export from a folder given as output",
}


def plain_settings(settings: Mapping[str, Any] | None, has_calibration: bool) -> dict[str, Any]:
    """Return settings by their dotted keys, with values that YAML has.

    Args:
        settings: By dotted keys or nested.
        has_calibration: Whether calibration data are given besides.

    Raises:
        ConfigurationError: If they are no mapping, have values that YAML has not, contradict each other, or say what an
            argument says.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        message = f'a {type(settings).__name__} is no mapping; give keys and values, such as {{"data.samples": 16}}'
        raise ConfigurationError("settings", message)
    own = _OWN | ({"data.dataset": "calibration is given as well; leave one of them out"} if has_calibration else {})
    found: dict[str, Any] = {}
    for key, value in _leaves(settings, ""):
        if key in own:
            raise ConfigurationError("settings", f"{key}: {own[key]}")
        _check_contradiction(found, key, value)
        found[key] = value
    return found


def _leaves(settings: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a class with its arguments, and a mapping with nothing in it, are values."""
    for key, value in settings.items():
        if not isinstance(key, str) or not key:
            where = f" in {prefix.removesuffix('.')}" if prefix else ""
            raise ConfigurationError("settings", f"{key!r}{where} is no key; keys are texts such as data.samples")
        value = _plain(value, f"{prefix}{key}")
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any, key: str) -> Any:
    """Return a value as YAML has it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, str | Path | torch.device):
        return _text(str(value), key)
    if isinstance(value, Mapping):
        return {name: _plain(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, key) for each in value]
    message = f"{key}: a {type(value).__name__} is no value of a configuration; those are null, true, numbers, texts,"
    raise ConfigurationError("settings", f"{message} lists, and classes by class_path and init_args")


def _text(text: str, key: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"{key}: half a surrogate pair stands as character {error.start + 1}"
        raise ConfigurationError("settings", message) from error
    return text


def _check_contradiction(found: Mapping[str, Any], key: str, value: Any) -> None:
    if key in found and found[key] != value:
        raise ConfigurationError("settings", f"{key}: it is given twice, as {found[key]!r} and as {value!r}")
    for other in found:
        outer, inner = sorted((other, key), key=len)
        if inner.startswith(f"{outer}."):
            raise ConfigurationError("settings", f"{outer} and {inner} are given both; leave one of them out")


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted keys as sections."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        section = sections
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return sections
