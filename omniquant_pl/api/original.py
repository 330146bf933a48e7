"""Saves a model in memory as a checkpoint, without changing the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.errors import ConfigurationError

__all__ = ["generation_parameters", "save_original"]


def save_original(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a checkpoint that holds a model as it is.

    transformers refuses to save generation parameters that contradict each other, and those in the model's
    configuration; both are common in published models, and loaded without complaint. So the generation configuration is
    written as it is, beside a view of the model that has a blank one.

    Args:
        model: The model, of which nothing is changed.
        tokenizer: Its tokenizer.
        folder: The folder to write.

    Raises:
        ConfigurationError: If transformers cannot save the model or the tokenizer.
    """
    view = copy.copy(model)  # shares modules and tensors; saving changes its configuration
    view.config = copy.deepcopy(model.config)
    view.generation_config = GenerationConfig()
    for name in generation_parameters(view.config):
        delattr(view.config, name)
    try:
        view.save_pretrained(folder, state_dict=_separate(model))
    except (ValueError, RuntimeError, StrictDataclassError) as error:
        raise ConfigurationError("model", f"transformers cannot save it: {_in_one_line(error)}") from error
    if model.generation_config is not None:
        path = folder / "generation_config.json"
        model.generation_config.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigurationError("tokenizer", f"it cannot be saved: {_in_one_line(error)}") from error


def generation_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return what a model's configuration says of generation, which transformers does not save there."""
    return dict(config._get_generation_parameters())


def _separate(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors, where those that are one in memory though not declared tied are copies.

    Only one of such tensors would be saved, and the others be missing.
    """
    tied, found = set(model.all_tied_weights_keys), set()
    tensors: dict[str, Tensor] = model.state_dict()
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        if place in found and name not in tied:
            tensors[name] = tensor.clone()
        found.add(place)
    return tensors


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
