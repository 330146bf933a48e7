"""A calibration step as the formulas read: plain eager torch in float32, every intermediate kept for autograd.

Source: OmniQuant (arXiv 2308.13137), equations 2 to 6. It is what the benchmarks compare with, for a LLaMA block; it
shares no code with the package but the names of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FormulaBlock", "Shape"]

_ATTENTION, _MLP = "self_attn", "mlp"
_READERS = {
    "input_layernorm": (f"{_ATTENTION}.q_proj", f"{_ATTENTION}.k_proj", f"{_ATTENTION}.v_proj"),
    "post_attention_layernorm": (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA block, and the tokens of a sample."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tokens: int

    @property
    def weights(self) -> int:
        """Of its linears."""
        head = self.hidden // self.heads
        return self.hidden * (2 * self.hidden + 2 * self.kv_heads * head + 3 * self.intermediate)


class FormulaBlock(nn.Module):
    """A LLaMA block that learns clipping and, with activation quantization, the equivalent transformation.

    Args:
        tensors: The block's weights by name.
        factors: Starting points, by the names that they have in files.
        shape: Its sizes.
        bits: Of the weights.
        group_size: Input channels that share a scale; ``None`` for all.
        activation_bits: ``None`` for activations as they are.
        theta: Of the rotary embedding.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
        shape: Shape,
        bits: int,
        group_size: int | None,
        activation_bits: int | None,
        theta: float,
    ) -> None:
        super().__init__()
        self.originals = dict(tensors)
        self.names = {name: f"factor{number}" for number, name in enumerate(factors)}
        for name, attribute in self.names.items():
            self.register_parameter(attribute, nn.Parameter(factors[name].detach().clone()))
        self.shape, self.bits, self.group_size, self.activation_bits = shape, bits, group_size, activation_bits
        head = shape.hidden // shape.heads
        device = next(iter(tensors.values())).device
        frequencies = theta ** (-torch.arange(0, head, 2, device=device) / head)
        angles = torch.arange(shape.tokens, device=device)[:, None] * frequencies
        self.cos, self.sin = (torch.cat((each, each), 1) for each in (angles.cos(), angles.sin()))
        self.mask = torch.full((shape.tokens, shape.tokens), -math.inf, device=device).triu(1)

    def factor(self, name: str) -> Tensor:
        """Return a factor by its name in files."""
        return self.get_parameter(self.names[name])

    def transformed(self) -> dict[str, Tensor]:
        """Return the weights with the equivalent transformation applied."""
        tensors = dict(self.originals)
        if "input_layernorm.scale" not in self.names:
            return tensors
        for norm, readers in _READERS.items():
            scale = self.factor(f"{norm}.scale")
            tensors[f"{norm}.weight"] = tensors[f"{norm}.weight"] / scale
            for name in readers:
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * scale
        query, key, value, output = (f"{_ATTENTION}.{kind}_proj" for kind in "qkvo")
        repeats = self.shape.heads // self.shape.kv_heads
        scale = self.factor(f"{value}.scale")
        tensors[f"{value}.weight"] = tensors[f"{value}.weight"] / scale[:, None]
        tensors[f"{output}.weight"] = tensors[f"{output}.weight"] * self._of_heads(scale, repeats)
        # Both channels of a rotary pair share a scale.
        scale = self.factor(f"{query}.scale").view(self.shape.kv_heads, -1).repeat(1, 2).flatten()
        tensors[f"{query}.weight"] = tensors[f"{query}.weight"] / self._of_heads(scale, repeats)[:, None]
        tensors[f"{key}.weight"] = tensors[f"{key}.weight"] * scale[:, None]
        return tensors

    def _of_heads(self, scale: Tensor, repeats: int) -> Tensor:
        return scale.view(self.shape.kv_heads, -1).repeat_interleave(repeats, 0).flatten()

    def weight(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """Return a fake-quantized weight."""
        weight = tensors[f"{name}.weight"]
        rows = weight.reshape(-1, self.group_size or weight.shape[1])
        high = torch.sigmoid(self.factor(f"{name}.clip.upper")).view(-1, 1) * rows.amax(1, keepdim=True)
        low = torch.sigmoid(self.factor(f"{name}.clip.lower")).view(-1, 1) * rows.amin(1, keepdim=True)
        return _fake_quantize(rows, low, high, self.bits).view_as(weight)

    def activation(self, values: Tensor) -> Tensor:
        """Activations, fake-quantized per token (and head)."""
        if self.activation_bits is None:
            return values
        return _fake_quantize(
            values, values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), self.activation_bits
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the block on ``[batch, tokens, channels]``."""
        tensors = self.transformed()

        def linear(name: str, values: Tensor) -> Tensor:
            return F.linear(self.activation(values), self.weight(tensors, name))

        def norm(name: str, values: Tensor) -> Tensor:
            return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * tensors[f"{name}.weight"]

        normed = norm("input_layernorm", hidden)
        query, key, value = (
            linear(f"{_ATTENTION}.{kind}_proj", normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for kind, heads in zip("qkv", (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads), strict=True)
        )
        query, key = self._rotated(query), self._rotated(key)
        query, key, value = self.activation(query), self.activation(key), self.activation(value)
        repeats = self.shape.heads // self.shape.kv_heads
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + self.mask
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + linear(f"{_ATTENTION}.o_proj", mixed)
        normed = norm("post_attention_layernorm", hidden)
        gated = F.silu(linear(f"{_MLP}.gate_proj", normed)) * linear(f"{_MLP}.up_proj", normed)
        return hidden + linear(f"{_MLP}.down_proj", gated)

    def _rotated(self, states: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * self.cos + torch.cat((-second, first), -1) * self.sin


def _fake_quantize(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Round to the grid of a range, which is made to contain zero; rounding passes its gradient."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=2**-14)
    zero = _round(-low / scale).clamp(0, 2**bits - 1)
    codes = (_round(values / scale) + zero).clamp(0, 2**bits - 1)
    grid: Tensor = (codes - zero) * scale
    return grid


def _round(values: Tensor) -> Tensor:
    return (values.round() - values).detach() + values
