"""The model of a run, ready to compute: from a packed folder, or folded and packed in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.checkpoint.tokenizer import open_tokenizer
from omniquant_pl.export.packed import PackedExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import load_packed
from omniquant_pl.runtime.folder import PackedFolder

__all__ = ["open_runnable"]

_WHAT_FOR = "to read a prompt with"


def open_runnable(
    model: OmniQuantModel, run: RunFolder, packed: Path | None, dtype: torch.dtype, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the quantized model and its tokenizer.

    Args:
        model: The run's settings.
        run: The run.
        packed: A packed folder to load instead of the run's model; ``None`` for ``packed/`` in the run folder, or,
            where that is missing or older than what the run has learned, the run's model packed in memory.
        dtype: What is not quantized is held and computed in it.
        device: Where to.

    Raises:
        ConfigurationError: If there is no tokenizer, or the folder or the run cannot be used.
    """
    if packed is not None:
        PackedFolder(packed)  # a folder that is none lacks more than a tokenizer
        tokenizer = open_tokenizer(packed, trust_remote_code=False).needed("packed", _WHAT_FOR)
        return load_packed(packed, dtype, device), tokenizer
    own = run.path / PackedExport.name
    if not _is_current(own, run):
        tokenizer = model.source.found_tokenizer.needed("model.path", _WHAT_FOR)
        return PackedExport().in_memory(model, run, dtype, device), tokenizer
    found = open_tokenizer(own, model.trust_remote_code)  # code in it is the original's
    if found.tokenizer is None:
        found = model.source.found_tokenizer
    tokenizer = found.needed("model.path", _WHAT_FOR)
    return load_packed(own, dtype, device), tokenizer


def _is_current(packed: Path, run: RunFolder) -> bool:
    """Return whether a packed folder is there and was written after the factors of every block."""
    config = packed / "config.json"
    if not config.is_file():
        return False
    written = config.stat().st_mtime
    return all(block.stat().st_mtime <= written for block in run.blocks.glob("*.safetensors"))
