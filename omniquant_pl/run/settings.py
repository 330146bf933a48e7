"""Settings that decide what is learned, so that a run with others is another run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

__all__ = ["TRAINER_DEFAULTS", "defaults_of", "differing_settings", "without_defaults"]

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "max_epochs": 20,
    "min_epochs": None,
    "precision": "32-true",
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
}
"""Keys of the section ``trainer`` that decide, with their defaults; besides them its callbacks and segments decide."""

_NOT_FINGERPRINTED = ("data.evaluation", "model.activation_budget")


def without_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not their defaults: a setting at its default never counts in a fingerprint.

    An option that is added later leaves the fingerprints of all runs without it as they are.

    Args:
        values: Settings by name. A dataclass counts as a mapping of its fields.
        defaults: Defaults by name; a value without one always counts.
    """
    return {name: _plain(value) for name, value in values.items() if name not in defaults or value != defaults[name]}


def defaults_of(section: type) -> dict[str, Any]:
    """Return the defaults of a section's settings, which are the arguments of its class."""
    parameters = inspect.signature(section).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _plain(value: Any) -> Any:
    """Return a value with the settings inside it that are not their defaults."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(value)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    return without_defaults({field.name: getattr(value, field.name) for field in fields(value)}, defaults)


def differing_settings(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return the keys of settings that decide what is learned and differ between two resolved configurations.

    Args:
        saved: What a run has left.
        config: What is to be compared with it; only its keys count.
    """
    sections = [f"{section}.{key}" for section in ("model", "data") for key in config[section]]
    trainer = [f"trainer.{key}" for key in (*TRAINER_DEFAULTS, "callbacks")]
    keys = [key for key in ("seed_everything", *sections, *trainer) if key not in _NOT_FINGERPRINTED]
    differing = [key for key in keys if _value(saved, key) != _value(config, key)]
    return differing + ([] if _are_same_segments(_segments(saved), _segments(config)) else ["trainer.strategy"])


def _are_same_segments(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """No number stands for that of the processes, which the fingerprint knows."""
    if one is None or other is None:
        return one is other
    return one[1:] == other[1:] and (one[0] == other[0] or None in (one[0], other[0]))


def _value(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (config.get(section) or {}).get(name) if name else config.get(section)


def _segments(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what a strategy decides: how many segments, and how they are stitched; ``None`` for blocks in order."""
    strategy = _value(config, "trainer.strategy")
    name = strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy
    if name != "block_parallel" and not str(name).endswith("BlockParallelStrategy"):
        return None
    options = (strategy.get("init_args") or {}) if isinstance(strategy, Mapping) else {}
    epochs = options.get("stitch_epochs", 0)
    return options.get("segments"), epochs, options.get("stitch_blocks", 1) if epochs else None
