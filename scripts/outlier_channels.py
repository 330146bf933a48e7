"""Give a LLaMA outlier channels, as large models have by themselves, without changing its function.

A channel after a norm is made larger in the norm's weight and smaller in the columns of the linears
that read it; a channel of v larger in the row of v and smaller in the columns of o. Activations
then have channels that dwarf the rest, which is what smoothing is for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


@dataclass(frozen=True)
class OutlierSpec:
    """How many channels are made outliers, and by which factors."""

    norm_channels: int
    """Channels after each norm of a block."""
    norm_range: tuple[float, float]
    """Their factors, drawn log-uniformly."""
    value_channels: int
    """Channels of v in each block."""
    value_range: tuple[float, float]
    """Their factors, drawn log-uniformly."""
    seed: int
    """Of the channels and factors."""


@torch.no_grad()
def add_outliers(model: LlamaForCausalLM, spec: OutlierSpec) -> None:
    """Rescale random channels of every block in place.

    Args:
        model: float32.
        spec: Which and how much.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    draw_norm = partial(_draw, spec.norm_channels, spec.norm_range, generator)
    draw_value = partial(_draw, spec.value_channels, spec.value_range, generator)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        _scale_norm(layer.input_layernorm.weight, readers, *draw_norm(model.config.hidden_size))
        readers = [mlp.gate_proj, mlp.up_proj]
        normed = layer.post_attention_layernorm.weight
        _scale_norm(normed, readers, *draw_norm(model.config.hidden_size))
        _scale_values(attention, *draw_value(attention.v_proj.out_features))


@torch.no_grad()
def relative_error(before: LlamaForCausalLM, after: LlamaForCausalLM, tokens: Tensor) -> float:
    """Norm of the difference of two models' logits over the norm of the first's.

    Args:
        before: The reference, float32.
        after: The rescaled model, float32.
        tokens: int64 [windows, length].

    Returns:
        The relative error.
    """
    expected, found = before(tokens).logits, after(tokens).logits
    return float((found - expected).norm() / expected.norm())


def _draw(count: int, span: tuple[float, float], generator: torch.Generator, width: int) -> tuple[Tensor, Tensor]:
    """Random channels of a width, int64 [count], and their factors, float32 [count]."""
    channels = torch.randperm(width, generator=generator)[:count]
    low, high = (math.log(end) for end in span)
    return channels, (low + (high - low) * torch.rand(count, generator=generator)).exp()


def _scale_norm(weight: Tensor, readers: list[nn.Linear], channels: Tensor, by: Tensor) -> None:
    weight[channels] *= by
    for linear in readers:
        linear.weight[:, channels] /= by


def _scale_values(attention: LlamaAttention, channels: Tensor, by: Tensor) -> None:
    """All q heads that share a kv head (grouped queries) have their own column of o for it."""
    width: int = attention.head_dim
    shared = attention.q_proj.out_features // attention.v_proj.out_features
    first = channels // width * shared  # the first q head of the kv head
    attention.v_proj.weight[channels] *= by[:, None]
    for head in range(shared):
        attention.o_proj.weight[:, (first + head) * width + channels % width] /= by
