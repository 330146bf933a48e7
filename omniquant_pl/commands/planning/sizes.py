"""The sizes of a model, read from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from omniquant_pl.checkpoint import is_hub_id, locate_model
from omniquant_pl.checkpoint.config import open_config
from omniquant_pl.checkpoint.skeleton import build_without_weights, unfuse_experts
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import Family, family_of

__all__ = ["Skeleton", "read_skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """Sizes of a model."""

    costs: tuple[int, ...]
    """Weights of every block's linears."""
    linears: tuple[tuple[int, int], ...]
    """Shapes ``(out, in)`` of the first block's linears."""
    channels: int
    """Of the hidden states."""
    positions: int
    others: int
    """Numbers around the blocks."""
    is_bfloat16: bool
    """Whether the weights are said to be stored in it."""


def read_skeleton(path: str) -> Skeleton:
    """Read a model's sizes; it need not have weights.

    Args:
        path: Name of an embedded model, path of a folder, or hub id, of which config.json alone is downloaded.

    Raises:
        ConfigurationError: If there is no configuration, or the family is not known.
    """
    opened = open_config(_download_config(path) if is_hub_id(path) else locate_model(path))
    whole = opened.whole
    with opened.blamed():
        family, config = family_of(whole), whole.get_text_config()
    dtypes = {str(each.dtype).removeprefix("torch.") for each in (whole, config)}  # before building sets them
    with opened.blamed(Exception):
        model = build_without_weights(whole, family, False)
    with opened.blamed():
        return _sizes(model, family, config, "bfloat16" in dtypes)


def _sizes(model: PreTrainedModel, family: Family, config: PretrainedConfig, is_bfloat16: bool) -> Skeleton:
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = list(cast(nn.ModuleList, model.get_submodule(family.blocks)))
    if not blocks:
        raise ValueError("num_hidden_layers is not above 0")
    shapes = []
    for index, block in enumerate(blocks):
        layout = family.block(config, index)
        unfuse_experts(block, layout)
        weights = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
        shapes.append([(weights[f"{name}.weight"][0], weights[f"{name}.weight"][1]) for name in layout.linears])
    costs = tuple(sum(rows * columns for rows, columns in each) for each in shapes)
    return Skeleton(
        costs,
        tuple(shapes[0]),
        config.hidden_size,
        int(config.max_position_embeddings),
        total - sum(costs),
        is_bfloat16,
    )


def _download_config(repository: str) -> Path:
    """Return the folder of a hub repository's config.json, without its weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        message = f"there is no folder {repository!r}, and its config.json cannot be downloaded: {reason}"
        raise ConfigurationError("model.path", message) from error
