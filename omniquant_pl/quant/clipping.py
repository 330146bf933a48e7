"""Learnable weight clipping: the share of each range that the codes cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from omniquant_pl.quant.affine import (
    QuantizedWeight,
    code_limits,
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
    shares of the range's two ends that are kept (OmniQuant, equation 2).

    Args:
        spec: Width, grouping, symmetry.
        shape: ``(out, in)`` of the weight.
        clipping: Where the factors start; ``None`` keeps the full range and has no parameters.
    """

    def __init__(self, spec: WeightSpec, shape: tuple[int, int], clipping: ClippingSpec | None) -> None:
        super().__init__()
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
        """Returns the unclipped range of a weight; a constant unless the weight is transformed while learning."""
        return RowRange(*row_range(to_rows(weight, self.group_size)))

    def _clipped(self, full: RowRange) -> RowRange:
        if self.upper is None:
            return full
        upper = torch.sigmoid(self.upper).view(-1, 1)
        lower = upper if self.lower is None else torch.sigmoid(self.lower).view(-1, 1)
        return RowRange(full.low * lower, full.high * upper)

    def forward(self, weight: Tensor, full_range: RowRange | None = None) -> Tensor:
        """Fake-quantizes a weight ``[out, in]``; ``full_range`` spares computing a constant range again."""
        bits, symmetric = self.spec.bits, self.spec.symmetric
        rows = to_rows(weight, self.group_size)
        if self.upper is None:
            scale, zero_point = scale_and_zero_point(*(full_range or row_range(rows)), bits, symmetric)
            result = fake_quantize(rows, scale, zero_point, *code_limits(bits, symmetric))
        else:
            lower = None if self.lower is None else self.lower.view(-1, 1)
            result = clipped_fake_quantize(rows, self.upper.view(-1, 1), lower, full_range, bits, symmetric)
        return from_rows(result, *self.shape)

    @torch.no_grad()
    def quantize(self, weight: Tensor, scale_dtype: torch.dtype, codes: Tensor | None = None) -> QuantizedWeight:
        """Chooses the codes of a weight against the scale as it will be stored.

        Args:
            weight: ``[out, in]`` float32, transformed already.
            scale_dtype: The dtype of the stored scales.
            codes: Codes ``[out, in]`` that were chosen otherwise; ``None`` for the nearest.
        """
        bits, symmetric = self.spec.bits, self.spec.symmetric
        clipped = self._clipped(self.range_of(weight))
        scale, zero_point = scale_and_zero_point(*clipped, bits, symmetric, scale_dtype)
        if codes is None:
            nearest = quantize(to_rows(weight, self.group_size), scale, zero_point, bits, symmetric)
            codes = from_rows(nearest, *self.shape)
        return QuantizedWeight(
            codes=codes.to(torch.int8 if symmetric else torch.uint8),
            scale=scale.view(self.shape[0], -1).to(scale_dtype),
            zero_point=None if symmetric else zero_point.view(self.shape[0], -1).to(torch.uint8),
            group_size=self.group_size,
        )
