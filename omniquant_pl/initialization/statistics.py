"""Scales and clipping to start from, by their output error on sampled tokens: AWQ and SmoothQuant with a search."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.quant import (
    ChannelRange,
    WeightQuantizer,
    activation_aware_scales,
    activation_quantizer,
    best_scale,
    clipping_logit,
    search_clipping,
)
from omniquant_pl.spec import ActivationSpec, ClippingSpec, TransformSpec
from omniquant_pl.transform import Pair

__all__ = ["initialize_clipping", "initialize_scales"]

_ALPHAS = tuple(step / 20 for step in range(21))


@torch.no_grad()
def initialize_scales(
    factors: BlockFactors,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, ChannelRange],
    samples: Mapping[str, Tensor],
    transform: TransformSpec,
    activations: ActivationSpec | None,
) -> None:
    """Set the scale of every pair whose consumers any token has reached.

    Args:
        factors: What is set; shifts become the middles of the ranges.
        tensors: The block's original tensors.
        inputs: Input ranges of its linears.
        samples: Sampled inputs ``[tokens, in]`` of its linears in full precision; only searches need them.
        transform: How to choose.
        activations: How the linears quantize their inputs.
    """
    for _, pair in factors.named_pairs():
        pair.initialize(tensors, inputs, transform.alpha)
        if transform.initial == "smoothquant":
            continue
        rows = None if transform.initial == "ones" else _sample_of(pair, samples)
        if rows is None:
            pair.scale.fill_(1.0)
            continue
        if transform.initial == "awq":
            candidates = [pair.gather(scale) for scale in activation_aware_scales(rows.abs().mean(0))]
        else:
            candidates = [torch.ones_like(pair.scale), *_scales_by_alpha(pair, tensors, inputs)]
        shifted = rows if pair.shift is None else rows - pair.spread(pair.shift)
        pair.scale.copy_(candidates[_best_of(candidates, pair, factors, tensors, shifted, activations)])


def _scales_by_alpha(pair: Pair, tensors: Mapping[str, Tensor], inputs: Mapping[str, ChannelRange]) -> list[Tensor]:
    found = []
    for alpha in _ALPHAS:
        pair.initialize(tensors, inputs, alpha)
        found.append(pair.scale.detach().clone())
    return found


def _sample_of(pair: Pair, samples: Mapping[str, Tensor]) -> Tensor | None:
    """Return what the consumers read: the same for all, or for experts what each was given."""
    found = {name: samples[name] for name in pair.consumers if name in samples}
    if not found:
        return None
    first = next(iter(found.values()))
    if all(torch.equal(first, other) for other in found.values()):
        return first
    return torch.cat(list(found.values()))[:: len(found)]


def _best_of(
    candidates: list[Tensor],
    pair: Pair,
    factors: BlockFactors,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    activations: ActivationSpec | None,
) -> int:
    quantizers = dict(factors.named_quantizers())
    return best_scale(
        [pair.spread(scale) for scale in candidates],
        [tensors[f"{name}.weight"] for name in pair.consumers],
        rows,
        [WeightQuantizer(quantizers[name].spec, quantizers[name].shape, None) for name in pair.consumers],
        activation_quantizer(activations),
    )


@torch.no_grad()
def initialize_clipping(
    factors: BlockFactors,
    tensors: Mapping[str, Tensor],
    samples: Mapping[str, Tensor],
    clipping: ClippingSpec,
    activations: ActivationSpec | None,
) -> None:
    """Set the clipping factors to the shares of the ranges with the least output error, queries and keys included.

    Args:
        factors: What is set; its scales are in place already.
        tensors: The block's original tensors.
        samples: Sampled inputs ``[tokens, in]`` of its linears in full precision.
        clipping: The highest logit.
        activations: How the linears quantize their inputs.
    """
    transformed = factors.transformed(tensors)
    quantize_input = activation_quantizer(activations)
    divided = {name: pair for _, pair in factors.named_pairs() for name in pair.consumers}
    for name, quantizer in factors.named_quantizers():
        if name not in samples or quantizer.upper is None:
            continue
        rows, pair = samples[name], divided.get(name)
        if pair is not None:
            shift = 0.0 if pair.shift is None else pair.spread(pair.shift)
            rows = (rows - shift) / pair.spread(pair.scale)
        if quantize_input is not None:
            rows = quantize_input(rows)
        share = search_clipping(transformed[f"{name}.weight"], rows, quantizer.spec)
        for end in (quantizer.upper, quantizer.lower):
            if end is not None:
                end.copy_(clipping_logit(share, clipping.initial))
