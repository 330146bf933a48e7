"""The folder that a run leaves behind: names of its files, and reading and writing them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from omniquant_pl.checkpoint import write_json, write_tensors
from omniquant_pl.errors import ConfigurationError

__all__ = ["VARIANTS", "RunFolder"]

VARIANTS = ("full_precision", "round_to_nearest", "quantized")
"""The models whose perplexities ``metrics.json`` holds."""

_DECIDING_TRAINER_KEYS = (
    "max_epochs",
    "precision",
    "callbacks",
    "limit_train_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)


class RunFolder:
    """Paths and files of one run.

    Args:
        path: ``trainer.default_root_dir``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.json"
        self.blocks = path / "blocks"
        self.model = path / "model"

    def start(self) -> None:
        """Makes room for a run: what an earlier one has left moves to ``previous/``, so that nothing gets mixed."""
        found = [path for path in (self.blocks, self.model, self.metrics) if path.exists()]
        if not found:
            return
        previous = self.path / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for path in found:
            path.rename(previous / path.name)

    def refuse_other_settings(self, config: Mapping[str, Any]) -> None:
        """Protects what a run with other settings has left here, and does not take it for these settings' own.

        Args:
            config: The resolved configuration of the run that is about to start, or to be measured.

        Raises:
            ConfigurationError: If factors are here that other settings have led to; it names the first that differs.
        """
        if not (self.config.is_file() and any(self.blocks.glob("*.safetensors"))):
            return
        saved = self.read_config()
        differing = [key for key in _deciding_keys(config) if _value(saved, key) != _value(config, key)]
        if differing:
            raise ConfigurationError(
                "trainer.default_root_dir",
                f"{self.path} holds a run with another {differing[0]}; choose another folder or delete that one",
            )

    def read_config(self, key: str = "trainer.default_root_dir") -> dict[str, Any]:
        """Returns the run's configuration, empty where it has none.

        Raises:
            ConfigurationError: If it is damaged; ``key`` is the setting that led here.
        """
        if not self.config.is_file():
            return {}
        try:
            return dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
            raise ConfigurationError(key, f"{self.config} is damaged: {error}") from error

    def factor_file(self, index: int) -> Path:
        """The file of one block's learned factors."""
        return self.blocks / f"{index:05d}.safetensors"

    def save_factors(self, index: int, factors: dict[str, Tensor]) -> None:
        """Writes one block's factors, whole or not at all."""
        write_tensors(self.factor_file(index), factors, {"format": "pt"})

    def load_factors(self, index: int, key: str = "trainer.default_root_dir") -> dict[str, Tensor]:
        """Reads one block's factors.

        Raises:
            ConfigurationError: If the file is missing or damaged; ``key`` is the setting that led here.
        """
        path = self.factor_file(index)
        try:
            return load_file(path)
        except FileNotFoundError as error:
            message = f"{path} is missing; the run in {self.path} has not finished block {index}"
            raise ConfigurationError(key, message) from error
        except SafetensorError as error:
            raise ConfigurationError(key, f"{path} is damaged: {error}") from error

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Replaces ``metrics.json``."""
        write_json(self.metrics, metrics)

    def read_metrics(self) -> dict[str, Any]:
        """Returns the content of ``metrics.json``, empty where there is none."""
        if not self.metrics.is_file():
            return {}
        content: dict[str, Any] = json.loads(self.metrics.read_text(encoding="utf-8"))
        return content


def _deciding_keys(config: Mapping[str, Any]) -> list[str]:
    """Names of the settings that decide what a calibration learns."""
    sections = [f"{section}.{key}" for section in ("model", "data") for key in config[section]]
    keys = ["seed_everything", *sections, *(f"trainer.{key}" for key in _DECIDING_TRAINER_KEYS)]
    return [key for key in keys if key != "data.evaluation"]


def _value(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (config.get(section) or {}).get(name) if name else config.get(section)
