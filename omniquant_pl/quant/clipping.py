"""Learnable weight clipping: the share of each range that the codes cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniquant_pl.ops import code_range
from omniquant_pl.quant.affine import (
    QuantizedWeight,
    from_rows,
    group_size_of,
    quantize,
    row_range,
    scale_and_zero_point,
    to_rows,
)
from omniquant_pl.quant.clipped import clipped_fake_quantize
from omniquant_pl.quant.fake_quantize import fake_quantize
from omniquant_pl.spec import ClippingSpec, WeightSpec

__all__ = ["RowRange", "WeightQuantizer"]


class RowRange(NamedTuple):
    """Lowest and highest value of each row of a weight, ``[out * groups, 1]`` each."""

    low: Tensor
    high: Tensor


class WeightQuantizer(nn.Module):
    """Quantizes one weight, with learnable clipping or with its full range (round-to-nearest).

    With clipping its parameters are ``upper`` and, for asymmetric codes, ``lower``: logits ``[out, groups]`` of the
    shares of the range's two ends that are kept (OmniQuant, equation 2). With learned rounding it has an ``offset``
    ``[out, in]`` as well, which is added before a code is rounded (SignRound, arXiv 2309.05516, equation 3).

    Args:
        spec: Width, grouping, symmetry.
        shape: ``(out, in)`` of the weight.
        clipping: Where the factors start; ``None`` keeps the full range.
        rounds: Whether rounding is learned.
    """

    def __init__(
        self, spec: WeightSpec, shape: tuple[int, int], clipping: ClippingSpec | None, rounds: bool = False
    ) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape)) if rounds else None
        self.spec = spec
        self.shape = shape
        self.group_size = group_size_of(spec, shape[1])
        self.upper: nn.Parameter | None = None
        self.lower: nn.Parameter | None = None
        if clipping is None:
            return
        factors = torch.full((shape[0], -(-shape[1] // self.group_size)), clipping.initial)
        self.upper = nn.Parameter(factors)
        if not spec.symmetric:
            self.lower = nn.Parameter(factors.clone())

    def range_of(self, weight: Tensor) -> RowRange:
        """Return the unclipped range of a weight; a constant unless the weight is transformed while learning."""
        return RowRange(*row_range(to_rows(weight, self.group_size)))

    def _clipped(self, full: RowRange) -> RowRange:
        if self.upper is None:
            return full
        upper = torch.sigmoid(self.upper).view(-1, 1)
        lower = upper if self.lower is None else torch.sigmoid(self.lower).view(-1, 1)
        return RowRange(full.low * lower, full.high * upper)

    def forward(self, weight: Tensor, full_range: RowRange | None = None) -> Tensor:
        """Fake-quantizes a weight ``[out, in]``; ``full_range`` spares computing a constant range again."""
        grid = self.spec.bits, self.spec.symmetric
        rows = to_rows(weight, self.group_size)
        offset = None if self.offset is None else to_rows(self.offset, self.group_size)
        if self.upper is None:
            scale, zero_point = scale_and_zero_point(*(full_range or row_range(rows)), *grid, self.spec.smallest_scale)
            if offset is not None:
                rows = torch.addcmul(rows, offset, scale)
            result = fake_quantize(rows, scale, zero_point, *code_range(*grid))
        else:
            lower = None if self.lower is None else self.lower.view(-1, 1)
            upper, smallest = self.upper.view(-1, 1), self.spec.smallest_scale
            result = clipped_fake_quantize(rows, upper, lower, full_range, *grid, smallest, offset)
        return from_rows(result, *self.shape)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the offsets within half a code."""
        if self.offset is not None:
            self.offset.clamp_(-0.5, 0.5)

    @torch.no_grad()
    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point of a transformed weight ``[out, in]`` as they are stored, ``[out, groups]``."""
        clipped = self._clipped(self.range_of(weight))
        scale_dtype: torch.dtype = getattr(torch, self.spec.scale_dtype)
        spec = self.spec
        scale, zero_point = scale_and_zero_point(*clipped, spec.bits, spec.symmetric, spec.smallest_scale, scale_dtype)
        scale = scale.view(self.shape[0], -1).to(scale_dtype)
        return scale, None if self.spec.symmetric else zero_point.view(self.shape[0], -1).to(torch.uint8)

    @torch.no_grad()
    def quantize(self, weight: Tensor, codes: Tensor | None = None) -> QuantizedWeight:
        """Choose the codes of a weight against the scale as it is stored.

        Args:
            weight: ``[out, in]`` float32, transformed already.
            codes: Codes ``[out, in]`` that were chosen otherwise; ``None`` for the nearest, after the learned offset.
        """
        bits, symmetric = self.spec.bits, self.spec.symmetric
        scale, zero_point = self.grid(weight)
        if codes is None:
            rows, row_scale = to_rows(weight, self.group_size), scale.to(weight.dtype).view(-1, 1)
            if self.offset is not None:
                rows = torch.addcmul(rows, to_rows(self.offset, self.group_size), row_scale)
            row_zero = torch.zeros_like(row_scale) if zero_point is None else zero_point.to(weight.dtype).view(-1, 1)
            codes = from_rows(quantize(rows, row_scale, row_zero, bits, symmetric), *self.shape)
        return QuantizedWeight(codes.to(torch.int8 if symmetric else torch.uint8), scale, zero_point, self.group_size)
