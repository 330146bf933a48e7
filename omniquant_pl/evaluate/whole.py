"""Whole models in memory, for programs that call them as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError, one_line
from omniquant_pl.runtime import load_packed

__all__ = ["open_exported", "open_full_precision"]


def open_full_precision(
    source: SourceModel, dtype: torch.dtype, device: torch.device, trusts_code: bool
) -> PreTrainedModel:
    """Load the model as it is stored.

    Args:
        source: The model.
        dtype: What it is held and computed in.
        device: Where to.
        trusts_code: Whether code that comes with it may run.

    Raises:
        ConfigurationError: If transformers cannot load it.
    """
    return _load("model.path", source.folder, dtype, device, trusts_code)


def open_exported(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load an exported folder: a packed one by this package, another by transformers.

    Raises:
        ConfigurationError: If it is neither.
    """
    config = folder / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError("exported", f"{folder} is no model folder that transformers loads: {error}") from error
    if (content.get("quantization_config") or {}).get("quant_method") == "omniquant":
        return load_packed(folder, dtype, device)
    return _load("exported", folder, dtype, device)


def _load(
    key: str, folder: Path, dtype: torch.dtype, device: torch.device, trusts_code: bool = False
) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trusts_code
        )
    except Exception as error:
        raise ConfigurationError(key, f"transformers cannot load {folder}: {one_line(error)}") from error
    torch.nn.Module.to(model, device)
    model.eval()
    return model
