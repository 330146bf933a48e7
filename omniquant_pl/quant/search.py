"""Activation-aware starting points for scales and clipping, found by search instead of by gradients.

Every search compares output errors on a sample of input tokens. A sample, not a second moment, because a moment cannot
show what quantizing the inputs does, and because with fewer tokens than channels it is also the cheaper of the two. The
searches choose one number for many outputs, for which a thousand tokens are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniquant_pl.ops import code_range
from omniquant_pl.quant.affine import group_size_of, row_range, scale_and_zero_point, to_rows
from omniquant_pl.quant.fake_quantize import fake_quantize
from omniquant_pl.spec import WeightSpec

__all__ = ["FULL_RANGE_LOGIT", "activation_aware_scales", "best_scale", "clipping_logit", "search_clipping"]

FULL_RANGE_LOGIT = 20.0
"""A logit whose sigmoid is exactly 1 in float32."""

_SMALLEST_MAGNITUDE = 1e-4
"""Of a channel, as a share of the largest channel's."""

_CHUNK = 2**24
"""Weights whose clipping is searched at once: 64 MiB for each of a few temporary tensors."""


def activation_aware_scales(magnitude: Tensor, points: int = 20) -> list[Tensor]:
    """Return the candidates ``magnitude^r`` of AWQ (arXiv 2306.00978, section 3.2) for ``points + 1`` ratios 0 to 1.

    Each is divided by the geometric mean of its largest and smallest value. The first, of ratio 0, is all ones.
    Channels below 1e-4 of the largest count as that, so all scales lie between 1e-2 and 1e2.

    Args:
        magnitude: Mean ``|X|`` of every input channel ``[in]``.
        points: Steps between the ratios.
    """
    largest = magnitude.float().max().clamp(min=torch.finfo(torch.float32).tiny)
    relative = (magnitude.float() / largest).clamp(min=_SMALLEST_MAGNITUDE)
    powers = [relative.pow(step / points) for step in range(points + 1)]
    return [power / (power.max() * power.min()).sqrt() for power in powers]


@torch.no_grad()
def best_scale(
    candidates: Sequence[Tensor],
    weights: Sequence[Tensor],
    inputs: Tensor,
    quantizers: Sequence[Callable[[Tensor], Tensor]],
    quantize_input: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Find the channel scale ``s`` with the least output error ``sum ||q(X / s) q(W s)^T - X W^T||^2``.

    With :func:`activation_aware_scales` as candidates this is the search of AWQ; with ``max|X|^a / max|W|^(1 - a)`` for
    a grid of ``a`` it finds the migration strength of SmoothQuant (arXiv 2211.10438). It costs two products of the
    sample with the weights for every candidate.

    Args:
        candidates: Scales ``[in]``, positive. Of equal ones the first is taken, and one whose error is not finite
            never is: put first what is to be kept where nothing is better.
        weights: ``[out, in]`` of every linear that reads the inputs.
        inputs: A sample of tokens ``[tokens, in]``, float32.
        quantizers: Fake quantization of each weight.
        quantize_input: Fake quantization of the inputs; ``None`` leaves them as they are.

    Returns:
        The index of the best candidate.
    """
    targets = [inputs @ weight.T for weight in weights]
    best, least = 0, float("inf")
    for index, scale in enumerate(candidates):
        scaled = inputs / scale
        if quantize_input is not None:
            scaled = quantize_input(scaled)
        consumers = zip(weights, quantizers, targets, strict=True)
        error = sum(
            float((scaled @ quantizer(weight * scale).T - target).square().sum())
            for weight, quantizer, target in consumers
        )
        if error < least:
            best, least = index, error
    return best


@torch.no_grad()
def search_clipping(
    weight: Tensor,
    inputs: Tensor,
    spec: WeightSpec,
    *,
    points: int = 20,
    smallest: float = 0.5,
) -> Tensor:
    """Find the share of each group's range, the same of both ends, with the least output error of that group.

    This is the clipping of AWQ (arXiv 2306.00978; its reference implementation leaves query and key projections
    unclipped, whose product amplifies the error). Memory stays bounded: rows of the weight are searched in parts.

    Args:
        weight: ``[out, in]`` float32, transformed already.
        inputs: A sample of tokens ``[tokens, in]`` float32 as they meet that weight.
        spec: How the weight is quantized.
        points: Shares that are compared, from 1 downwards.
        smallest: The smallest share.

    Returns:
        Shares ``[out, groups]``; of equal ones the largest.
    """
    shares = torch.linspace(1.0, smallest, points).tolist()
    tokens = _compact_groups(inputs, group_size_of(spec, weight.shape[1]))
    parts = weight.split(max(1, _CHUNK // weight.shape[1]))
    return torch.cat([_best_shares(part, tokens, spec, shares) for part in parts])


def _compact_groups(inputs: Tensor, group_size: int) -> Tensor:
    """Return ``[groups, at most group_size, group_size]`` with the same second moment per group as the inputs."""
    groups = to_rows(inputs, group_size).view(len(inputs), -1, group_size).transpose(0, 1)
    return torch.linalg.qr(groups, mode="r").R if len(inputs) > group_size else groups


def _best_shares(weight: Tensor, tokens: Tensor, spec: WeightSpec, shares: Sequence[float]) -> Tensor:
    """Return the best of the shares ``[out, groups]``; ``tokens`` is ``[groups, tokens, group_size]``."""
    group_size, grid = tokens.shape[2], (spec.bits, spec.symmetric)
    rows = to_rows(weight, group_size)
    low, high = row_range(rows)
    best = rows.new_ones(len(weight), len(tokens))
    least = torch.full_like(best, torch.inf)
    for share in shares:
        scale, zero_point = scale_and_zero_point(low * share, high * share, *grid, spec.smallest_scale)
        error = fake_quantize(rows, scale, zero_point, *code_range(*grid)) - rows
        grouped = error.view(len(weight), -1, group_size).transpose(0, 1)  # [groups, out, group_size]
        power = (grouped @ tokens.mT).square().sum(2).T  # [out, groups]
        best = torch.where(power < least, share, best)
        least = torch.minimum(power, least)
    return best


def clipping_logit(share: Tensor, highest: float = FULL_RANGE_LOGIT) -> Tensor:
    """Return the clipping factor whose sigmoid is the share of a range that is kept.

    Args:
        share: 0 to 1.
        highest: The largest logit, which a share of 1 gets. The default keeps the range exactly, but its gradient is
            zero: where clipping is to be learned from here, give the logit that learning starts from.
    """
    return torch.logit(share).clamp(-highest, highest)
