"""Ways of loading an exported folder that several formats share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["transformers_logits"]


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """Load a folder with transformers.

    Args:
        folder: An exported folder.
        tokens: Token ids ``[batch, tokens]``.
        dtype: What it computes in.
        options: Further arguments of ``from_pretrained``.

    Returns:
        Logits ``[batch, tokens, vocabulary]``, in that dtype.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    logits: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return logits.to(dtype).cpu()
