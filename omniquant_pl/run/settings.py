"""Settings that decide what is learned, so that a run with others is another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FINGERPRINTED_TRAINER_KEYS", "differing_settings"]

FINGERPRINTED_TRAINER_KEYS = (
    "max_epochs",
    "min_epochs",
    "precision",
    "limit_train_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)
"""Of the section ``trainer``; besides them its callbacks and segments decide."""

_NOT_FINGERPRINTED = ("data.evaluation", "model.activation_budget")


def differing_settings(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Returns the keys of settings that decide what is learned and differ between two resolved configurations.

    Args:
        saved: What a run has left.
        config: What is to be compared with it; only its keys count.
    """
    sections = [f"{section}.{key}" for section in ("model", "data") for key in config[section]]
    trainer = [f"trainer.{key}" for key in (*FINGERPRINTED_TRAINER_KEYS, "callbacks")]
    keys = [key for key in ("seed_everything", *sections, *trainer) if key not in _NOT_FINGERPRINTED]
    differing = [key for key in keys if _value(saved, key) != _value(config, key) and not _is_new(saved, config, key)]
    return differing + ([] if _are_same_segments(_segments(saved), _segments(config)) else ["trainer.strategy"])


def _is_new(saved: Mapping[str, Any], config: Mapping[str, Any], key: str) -> bool:
    """Whether an option that the run did not know yet is off, as it was."""
    section, _, name = key.partition(".")
    return bool(name) and name not in (saved.get(section) or {}) and not _value(config, key)


def _are_same_segments(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """No number stands for that of the processes, which the fingerprint knows."""
    if one is None or other is None:
        return one is other
    return one[1:] == other[1:] and (one[0] == other[0] or None in (one[0], other[0]))


def _value(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (config.get(section) or {}).get(name) if name else config.get(section)


def _segments(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a strategy decides: how many segments, and how they are stitched; ``None`` for blocks in order."""
    strategy = _value(config, "trainer.strategy")
    name = strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy
    if name != "block_parallel" and not str(name).endswith("BlockParallelStrategy"):
        return None
    options = (strategy.get("init_args") or {}) if isinstance(strategy, Mapping) else {}
    epochs = options.get("stitch_epochs", 0)
    return options.get("segments"), epochs, options.get("stitch_blocks", 1) if epochs else None
