"""Quantized attention inputs, through the attention interface of transformers.

A model built with ``attn_implementation=ATTENTION`` calls :func:`attention_forward` with q, k and v after the rotary
embedding. Softmax probabilities stay in full precision, as in OmniQuant.

Attention is PyTorch's fused one, unless the model caps its attention logits (Gemma 2), which that cannot do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from omniquant_pl.quant import dynamic_fake_quantize
from omniquant_pl.spec import ActivationSpec

__all__ = ["ATTENTION", "AttentionInputs", "attention_forward", "capped_attention"]

ATTENTION = "omniquant_pl"
"""The name under which the attention function is registered with transformers."""


class AttentionInputs(nn.Module):
    """Quantizes q, k and v per token and head.

    Args:
        spec: Width and symmetry.
    """

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Quantize tensors ``[batch, heads, tokens, head_dim]`` over their last dimension."""
        return tuple(dynamic_fake_quantize(state, self.spec.bits, self.spec.symmetric) for state in states)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float,
    scaling: float | None = None,
    is_causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Attention whose logits are ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: Like ``key``.
        mask: Boolean, true where a query may look, or added to the logits; broadcasts to
            ``[batch, heads, queries, keys]``. ``None``: ``is_causal`` says.
        softcap: Bound of the logits' magnitude.
        scaling: Factor of the logits; ``None``: ``head_dim ** -0.5``.
        is_causal: Whether several queries without a mask look only at the keys up to their own.
        dropout: Probability with which a weight is dropped.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    groups, (queries, head_dim) = query.shape[1] // key.shape[1], query.shape[2:]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    logits = query @ key.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling)
    logits = softcap * torch.tanh(logits / softcap)
    if mask is None and is_causal and queries > 1:
        mask = logits.new_ones(queries, key.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention whose inputs are quantized where the module carries ``attention_inputs``.

    Args:
        module: The model's attention module.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, keys, head_dim]``.
        value: Like ``key``.
        attention_mask: As transformers' ``sdpa`` takes it.
        softcap: Bound of the attention logits' magnitude; ``None`` for none.
        options: As transformers' ``sdpa`` takes them: scaling, dropout, ...

    Returns:
        ``[batch, queries, heads, head_dim]``, and no attention weights.
    """
    inputs = getattr(module, "attention_inputs", None)
    if inputs is not None:
        query, key, value = inputs(query, key, value)
    if softcap is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    causal = options.get("is_causal")
    output = capped_attention(
        query,
        key,
        value,
        attention_mask,
        softcap,
        options.get("scaling"),
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        options.get("dropout", 0.0),
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
