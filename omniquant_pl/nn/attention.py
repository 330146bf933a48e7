"""Quantized attention inputs, through the attention interface of transformers.

A model built with ``attn_implementation=ATTENTION`` calls :func:`attention_forward` with q, k and v after the rotary
embedding. Softmax probabilities stay in full precision, as in OmniQuant.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from omniquant_pl.quant import dynamic_fake_quantize
from omniquant_pl.spec import ActivationSpec

__all__ = ["ATTENTION", "AttentionInputs", "attention_forward"]

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
        """Quantizes tensors ``[batch, heads, tokens, head_dim]`` over their last dimension."""
        return tuple(dynamic_fake_quantize(state, self.spec.bits, self.spec.symmetric) for state in states)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention whose inputs are quantized where the module carries ``attention_inputs``."""
    inputs = getattr(module, "attention_inputs", None)
    if inputs is not None:
        query, key, value = inputs(query, key, value)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
