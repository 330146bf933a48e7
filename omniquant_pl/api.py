"""Quantizes a transformers model that is in memory, by the same fit as the command line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.cli import quieten, run
from omniquant_pl.data.decoding import whole_text
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import refuse_target
from omniquant_pl.presets import find_config

__all__ = ["quantize"]


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scheme: str = "w4a16g128",
    *,
    calibration: str | Sequence[str] | Tensor | None = None,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> PreTrainedModel:
    """Quantizes a causal language model by OmniQuant.

    The model is saved, calibrated by ``fit`` and loaded again: ``python train.py fit --config w4a16g128.yaml`` on the
    same model and tokens gives the same weights.

    Args:
        model: The model; it stays as it is.
        tokenizer: Its tokenizer, which only text needs.
        scheme: Name of a preset, such as ``w4a16g128`` or ``best/w3a16``, or the path of a configuration.
        calibration: Texts, token ids ``[windows, length]``, or what ``data.dataset`` takes; ``None``: the preset's.
        settings: Further settings by their keys in YAML, such as ``{"trainer.max_epochs": 5, "data.samples": 16}``;
            perplexities are measured if ``data.evaluation`` is among them.
        output: The run folder, which ``python train.py export --config <output>/config.yaml`` and the other commands
            take; ``None``: one that is deleted in the end.

    Returns:
        The calibrated model in the dtype of the one that was given, its weights dequantized: in float32 exactly
        ``(code - zero point) * scale``. Activations are not quantized, whatever the scheme.

    Raises:
        ConfigurationError: If the scheme, a setting, the model, the text or the run folder cannot be used.
    """
    with _folder(output) as folder:
        source = folder / "original"
        if (folder / "config.yaml").exists():  # of that model, which would be replaced
            raise ConfigurationError("output", f"{folder} holds a run; give a new folder, or delete that one")
        refuse_target(folder / "model", folder, Path(model.name_or_path or source), "output")
        model.save_pretrained(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        given: dict[str, Any] = {"model.path": str(source), "trainer.default_root_dir": str(folder)}
        given |= _data(calibration, folder) | {"data.evaluation": [], "progress.quiet": True} | dict(settings or {})
        _fit(scheme, given | {"export.format": "hf"})
        quantized: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=model.dtype)
    nn.Module.to(quantized, model.device)
    quantized.eval()
    return quantized


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="omniquant-") as folder:
        yield Path(folder)


def _data(calibration: str | Sequence[str] | Tensor | None, folder: Path) -> dict[str, Any]:
    """What a configuration says of the calibration set, which is written into the folder where it is in memory."""
    if calibration is None:
        return {}
    if isinstance(calibration, str):
        return {"data.dataset": calibration}
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2:
            message = f"token ids are [windows, length], not {list(calibration.shape)}"
            raise ConfigurationError("calibration", message)
        path = folder / "calibration.npy"
        np.save(path, calibration.cpu().numpy())
        return {"data.dataset": str(path), "data.samples": len(calibration)}
    path = folder / "calibration.txt"
    texts = [_checked_text(text, row) for row, text in enumerate(calibration)]
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return {"data.dataset": str(path)}


def _checked_text(text: str, row: int) -> str:
    try:
        text = whole_text(text)
    except ValueError as error:
        raise ConfigurationError("calibration", f"row {row} has {error} where text is needed") from error
    if "\0" in text:
        raise ConfigurationError("calibration", f"row {row} holds NUL, which text does not")
    return text


def _fit(scheme: str, given: Mapping[str, Any]) -> None:
    """Runs the command line's fit, and leaves random numbers and the seed in the environment as they were."""
    name = scheme if scheme.endswith((".yaml", ".yml")) else f"{scheme}.yaml"
    flags = [f"--{key}={_text(value)}" for key, value in given.items()]
    quieten()
    seed = os.environ.get("PL_GLOBAL_SEED")
    try:
        with isolate_rng():
            run(["fit", f"--config={find_config(name)}", *flags])
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


def _text(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, str | Path):
        return str(value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=1_000_000)).strip().removesuffix("\n...")
