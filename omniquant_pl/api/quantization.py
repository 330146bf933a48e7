"""Quantizes a transformers model that is in memory, by the same fit as the command line."""

from __future__ import annotations

import copy
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.api.calibration import Calibration, check_datasets, read_calibration
from omniquant_pl.api.fit import WaitingFit, prepare_fit
from omniquant_pl.api.model import Limits, check_finite, check_model, check_tokenizer
from omniquant_pl.api.original import generation_parameters, save_original
from omniquant_pl.api.process import untouched_process
from omniquant_pl.api.settings import plain_settings
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import check_target
from omniquant_pl.utils.signals import Interrupted

__all__ = ["quantize"]


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scheme: str | Path = "w4a16g128",
    *,
    calibration: Calibration | None = None,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> PreTrainedModel:
    """Quantize a causal language model by OmniQuant.

    The model is saved, calibrated by ``fit`` and loaded again: ``python train.py fit --config w4a16g128.yaml`` on the
    same model and tokens gives the same weights. Arguments are checked before the model is saved. The model, and the
    process's random numbers, environment, signal handlers, loggers and torch settings stay as they were.

    Args:
        model: The model, in full precision and on one device.
        tokenizer: Its tokenizer, which text and conversations need.
        scheme: Name of a preset, such as ``w4a16g128`` or ``best/w3a16``, or the path of a configuration.
        calibration: What ``data.dataset`` takes; ``None`` for the preset's dataset; or rows of one kind: texts, token
            ids, or conversations for the tokenizer's chat template. Rows come as a list, a generator, a
            ``datasets.Dataset``, a ``DataLoader``, a tensor or an array; a row that is a mapping holds ``input_ids``
            (where ``attention_mask`` is 0, they are padding and left out), ``messages``, ``conversations`` or
            ``text``. Rows of token ids are windows, used in order, if all are ``data.sequence_length`` long, or,
            without that setting, all of one length that the model has positions for. Other rows are joined, texts by
            an empty line, and ``data.samples`` random windows are cut from them, as from a single sequence of token
            ids. Of an iterable without a length, rows are read until they hold that many windows.
        settings: Further settings by their keys in YAML, such as ``{"trainer.max_epochs": 5, "data.samples": 16}``, or
            nested; perplexities are measured if ``data.evaluation`` is among them.
        output: The run folder, which ``python train.py export --config <output>/config.yaml`` and the other commands
            take; ``None``: one that is deleted in the end.

    Returns:
        The calibrated model in the dtype of the one that was given, its weights dequantized: in float32 exactly
        ``(code - zero point) * scale``. Activations are not quantized, whatever the scheme. Its generation
        configuration is that of the model.

    Raises:
        ConfigurationError: If an argument or a setting cannot be used; it names the argument.
        CalibrationError: If the calibration diverges.
    """
    try:
        with untouched_process(), _folder(output) as folder:
            check_model(model)
            check_tokenizer(tokenizer)
            _check_output(folder, model)
            fit, tokens = _prepare(model, tokenizer, scheme, calibration, settings, folder)
            save_original(model, tokenizer, folder / "original")
            if tokens is not None:
                np.save(folder / "calibration.npy", tokens.numpy())
            fit.go()
            return _load(folder / "model", model)
    except Interrupted as error:
        signal.raise_signal(error.signal_number)  # for the handlers that were there before
        raise KeyboardInterrupt(str(error)) from error


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="omniquant-") as folder:
            yield Path(folder)
    elif isinstance(output, str | Path):
        yield Path(output).expanduser().absolute()
    else:
        raise ConfigurationError("output", f"{output!r} is no path of a folder")


def _check_output(folder: Path, model: PreTrainedModel) -> None:
    """Refuse a folder that cannot be written, or whose content would be lost."""
    if (folder / "config.yaml").exists():  # of the model saved beside it, which would be replaced
        raise ConfigurationError("output", f"{folder} holds a run; give a new folder, or delete that one")
    for path in (folder / "original", folder / "calibration.npy"):
        if path.exists():
            raise ConfigurationError("output", f"{path} is there already and would be replaced; give a new folder")
    check_target(folder / "model", folder, Path(model.name_or_path or folder / "original"), "output")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigurationError("output", f"{existing} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigurationError("output", f"{existing} cannot be written to: {error.strerror}") from error


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    scheme: str | Path,
    calibration: Calibration | None,
    settings: Mapping[str, Any] | None,
    folder: Path,
) -> tuple[WaitingFit, Tensor | None]:
    """Check everything there is to check, and return the fit and the tokens that it is to find in the folder."""
    own = plain_settings(settings, has_calibration=calibration is not None)
    given: dict[str, Any] = {"data.evaluation": [], "progress.quiet": True} | own
    given |= {"model.path": str(folder / "original"), "trainer.default_root_dir": str(folder), "export.format": "hf"}
    if isinstance(calibration, str | Path):
        given["data.dataset"] = str(calibration)
    elif calibration is not None:
        given["data.dataset"] = str(folder / "calibration.npy")
    fit = prepare_fit(scheme, given)
    if calibration is None or isinstance(calibration, str | Path):
        check_datasets(fit.data, tokenizer, "data.dataset" if calibration is None else "calibration")
        return fit, None
    check_datasets(fit.data, tokenizer, None)
    tokens = read_calibration(calibration, tokenizer, Limits.of(model), fit.data, "data.samples" in own)
    if tokens.ndim == 2 and "data.samples" not in own:
        fit = prepare_fit(scheme, given | {"data.samples": len(tokens)})
    return fit, tokens


def _load(folder: Path, original: PreTrainedModel) -> PreTrainedModel:
    """Load the calibrated model, with the original's dtype, device and generation configuration."""
    # One of its own for the while: the original's may be one that transformers warns of, or refuses to read.
    options = {"dtype": original.dtype, "generation_config": GenerationConfig()}
    quantized: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    check_finite(quantized)
    quantized.generation_config = copy.deepcopy(original.generation_config)
    for name, value in generation_parameters(original.config).items():
        setattr(quantized.config, name, value)
    nn.Module.to(quantized, original.device)
    quantized.eval()
    return quantized
