"""Loads GGUF files with llama.cpp."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["llama_cpp_logits"]

_FLOAT32 = 0  # GGML_TYPE_F32


def _first_file(folder: Path) -> Path:
    """Return the file that names the others, if there are several."""
    return min(folder.glob("*.gguf"))


def llama_cpp_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Load a folder with llama-cpp-python, on the CPU, keys and values in float32.

    Args:
        folder: An exported folder.
        tokens: Token ids ``[batch, tokens]``.

    Returns:
        Logits ``[batch, tokens, vocabulary]``, float32.
    """
    from llama_cpp import Llama

    length, threads = tokens.shape[1], torch.get_num_threads()
    model = Llama(
        str(_first_file(folder)),
        n_gpu_layers=0,
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        type_k=_FLOAT32,
        type_v=_FLOAT32,
        verbose=False,
    )
    logits = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        logits.append(torch.tensor(model.scores[:length]))
    return torch.stack(logits)
