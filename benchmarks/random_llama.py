"""LLaMAs of random weights, the same in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["save_random_llama"]


def save_random_llama(folder: Path, **sizes: Any) -> Path:
    """Write a model folder unless it is there, and return it.

    Args:
        folder: Where.
        sizes: As :class:`transformers.LlamaConfig`.
    """
    if not folder.is_dir():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder
