"""Quantize a transformers model that is in memory, by the same fit as the command line."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.cli.program import QUIETENED, quieten, raising_errors, run
from omniquant_pl.data.in_memory import Calibration, write_calibration
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import check_target
from omniquant_pl.utils.presets import find_config

__all__ = ["quantize"]


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scheme: str = "w4a16g128",
    *,
    calibration: Calibration = None,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> PreTrainedModel:
    """Quantize a causal language model by OmniQuant.

    The model is saved, calibrated by ``fit`` and loaded again: ``python train.py fit --config w4a16g128.yaml`` on the
    same model and tokens gives the same weights.

    Args:
        model: The model; it stays as it is.
        tokenizer: Its tokenizer, which texts and conversations need.
        scheme: Name of a preset, such as ``w4a16g128`` or ``best/w3a16``, or the path of a configuration.
        calibration: What to calibrate on. ``None``: the preset's data. A string or a path: what ``data.dataset`` takes.
            A tensor or array of token ids: ``[windows, length]`` as it is, or a stream ``[tokens]``. Otherwise rows, as
            a list, a ``datasets.Dataset`` or a loader of batches has them: texts; token ids; mappings with ``text``,
            ``input_ids`` (padding is left out by ``attention_mask``), ``messages`` or ``conversations``; conversations
            of ``{role, content}``, which pass through the tokenizer's chat template. Texts are joined to one stream, as
            are token ids of several lengths; token ids of one length are the windows.
        settings: Further settings by their keys in YAML, such as ``{"trainer.max_epochs": 5, "data.samples": 16}``;
            perplexities are measured if ``data.evaluation`` is among them.
        output: The run folder, which ``python train.py export --config <output>/config.yaml`` and the other commands
            take; ``None``: one that is deleted in the end.

    Returns:
        The calibrated model in the dtype of the one that was given, its weights dequantized: in float32 exactly
        ``(code - zero point) * scale``. Activations are not quantized, whatever the scheme.

    Raises:
        ConfigurationError: If the scheme, a setting, the model, a row of the calibration data or the run folder cannot
            be used; the model has not been saved then.
        CalibrationError: If the calibration cannot go on.
    """
    _check_model(model)
    with _folder(output) as folder, _unchanged_process():
        source = folder / "original"
        if (folder / "config.yaml").exists():  # of that model, which would be replaced
            raise ConfigurationError("output", f"{folder} holds a run; give a new folder, or delete that one")
        check_target(folder / "model", folder, Path(model.name_or_path or source), "output")
        given: dict[str, Any] = {"model.path": str(source), "trainer.default_root_dir": str(folder)}
        given |= {"data.evaluation": [], "progress.quiet": True}
        arguments = _arguments(scheme, given | dict(settings or {}))
        run(arguments, runs=False)
        given |= write_calibration(calibration, tokenizer, folder, _longest_window(model, settings or {}))
        _save(model, source)
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        run(_arguments(scheme, given | dict(settings or {}) | {"export.format": "hf"}))
        quantized: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=model.dtype)
    nn.Module.to(quantized, model.device)
    quantized.eval()
    return quantized


def _check_model(model: Any) -> None:
    """Refuse what is no model of transformers, or one that cannot be saved as it was.

    Raises:
        ConfigurationError: It says what would be right.
    """
    if not isinstance(model, PreTrainedModel):
        merge = "; merge its adapters first, by merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise ConfigurationError("model", f"{type(model).__name__} is no model of transformers{merge}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigurationError("model", "it has adapters; merge them into the weights first")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigurationError("model", "it is quantized already; give the original model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            "model", "some weights are offloaded; load it without device_map, or give its folder to fit"
        )


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model with its generation settings as they are: transformers refuses to write inconsistent ones."""
    generation = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")


def _longest_window(model: PreTrainedModel, settings: Mapping[str, Any]) -> int | None:
    """Tokens that a window may have; ``None`` where nothing says it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return settings.get("data.sequence_length") or positions


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="omniquant-") as folder:
        yield Path(folder)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Leave random numbers, the seed in the environment, warnings and levels of loggers as they were."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    levels = {name: logging.getLogger(name).level for name in QUIETENED}
    try:
        with warnings.catch_warnings(), isolate_rng(), raising_errors():
            quieten()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        os.environ.pop("PL_GLOBAL_SEED", None)
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


def _arguments(scheme: str, given: Mapping[str, Any]) -> list[str]:
    """The command line of a fit."""
    name = scheme if scheme.endswith((".yaml", ".yml")) else f"{scheme}.yaml"
    return ["fit", f"--config={find_config(name)}", *(f"--{key}={_text(value)}" for key, value in given.items())]


def _text(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, str | Path):
        return str(value)
    return str(yaml.safe_dump(_plain(value), default_flow_style=True, width=1_000_000)).strip().removesuffix("\n...")


def _plain(value: Any) -> Any:
    """A value of YAML's own types: numbers of numpy and torch, paths and dtypes as what they stand for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path | torch.dtype):
        return str(value).removeprefix("torch.")
    return value.item() if hasattr(value, "item") else value
