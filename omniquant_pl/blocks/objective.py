"""How far predicted tokens are from the model's own, a stretch of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["mean_divergence"]

_CHUNK_TOKENS = 1024
"""Logits of so many tokens are in memory at once: 0.5 GB in float32 for a vocabulary of 128 thousand."""


def mean_divergence(
    head: Callable[[Tensor], Tensor], output: Tensor, target: Tensor, chunk_tokens: int = _CHUNK_TOKENS
) -> Tensor:
    """Return the Kullback-Leibler divergence of the predictions, ``KL(p_target || p_output)``, mean over tokens.

    Args:
        head: Makes logits ``[batch, tokens, vocabulary]`` of hidden states ``[batch, tokens, channels]``, each
            token for itself.
        output: Hidden states ``[batch, tokens, channels]``; gradients flow into them.
        target: Hidden states of the same shape; no gradients.
        chunk_tokens: Tokens whose logits are held at once, at least one of each sample; those of further tokens are
            computed again for their gradients.
    """
    # Never more tokens of a sample than it has: a model computes no position behind its last one.
    length = max(1, chunk_tokens // len(output))
    outputs, targets = output.split(length, dim=1), target.split(length, dim=1)
    count = output.shape[:2].numel()
    if len(outputs) == 1:
        return _sum_of_divergences(head, output, target) / count
    parts = [
        cast(Tensor, checkpoint(_sum_of_divergences, head, *pair, use_reentrant=False, preserve_rng_state=False))
        for pair in zip(outputs, targets, strict=True)
    ]
    return torch.stack(parts).sum() / count


def _sum_of_divergences(head: Callable[[Tensor], Tensor], output: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        expected = F.log_softmax(head(target).float(), dim=-1)
    found = F.log_softmax(head(output).float(), dim=-1)
    return F.kl_div(found, expected, reduction="sum", log_target=True)
