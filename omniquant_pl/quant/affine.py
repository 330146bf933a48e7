"""Uniform affine quantization: ranges, scales, codes.

Everything here works on *rows*: a weight ``[out, in]`` is viewed as ``[out * groups, group_size]`` so that one row
shares one scale and one zero point. A shorter last group is padded with zeros, which change no range because every
range contains zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omniquant_pl.ops import code_range
from omniquant_pl.spec import WeightSpec

__all__ = [
    "QuantizedWeight",
    "from_rows",
    "group_size_of",
    "quantize",
    "row_range",
    "scale_and_zero_point",
    "to_rows",
]

EMPTY_GROUP_SCALE = 2.0**-14
"""The scale of a group without extent: float16's smallest normal number."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The codes of one weight and what they mean.

    Attributes:
        codes: Integer codes ``[out, in]``; uint8 with a zero point, int8 without.
        scale: Scales ``[out, groups]`` in the dtype they are stored in.
        zero_point: uint8 zero points ``[out, groups]``, or ``None`` for symmetric codes.
        group_size: Input channels that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int

    def dequantize(self) -> Tensor:
        """Return ``(codes - zero_point) * scale`` as float32 ``[out, in]``."""
        per_channel = self.codes.float()
        columns = self.codes.shape[1]
        if self.zero_point is not None:
            per_channel = per_channel - _expand(self.zero_point.float(), self.group_size, columns)
        return per_channel * _expand(self.scale.float(), self.group_size, columns)


def _expand(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat ``[out, groups]`` to ``[out, columns]``."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def group_size_of(spec: WeightSpec, columns: int) -> int:
    """Return the group size for a weight with that many input channels."""
    return columns if spec.group_size is None else min(spec.group_size, columns)


def to_rows(weight: Tensor, group_size: int) -> Tensor:
    """View ``[out, in]`` as ``[out * groups, group_size]``, the last group padded with zeros."""
    padding = -weight.shape[1] % group_size
    padded = F.pad(weight, (0, padding)) if padding else weight
    return padded.reshape(-1, group_size)


def from_rows(rows: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the inverse of :func:`to_rows`."""
    return rows.reshape(out_features, -1)[:, :in_features]


def row_range(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return lowest and highest value per row, ``[rows, 1]`` each; the range always contains zero."""
    return rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)


def _round_straight_through(value: Tensor) -> Tensor:
    return value + (value.round() - value).detach()


def scale_and_zero_point(
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    smallest: float,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point of a range that contains zero; rounding is straight-through.

    With a ``scale_dtype`` the scale is rounded to it first, and the zero point is computed against that, so that what
    is stored reproduces what was calibrated.

    Args:
        low: Lowest values ``[rows, 1]``, at most 0.
        high: Highest values ``[rows, 1]``, at least 0.
        bits: Code width.
        symmetric: Signed codes and no zero point.
        smallest: The floor of the scale.
        scale_dtype: The dtype that the scale will be stored in; ``None`` while learning.

    Returns:
        Scale and zero point ``[rows, 1]`` in the dtype of ``low``; the zero point is an integer value.
    """
    _, highest_code = code_range(bits, symmetric)
    extent = torch.maximum(-low, high) if symmetric else high - low
    scale = (extent / highest_code).clamp(min=smallest)
    if smallest < EMPTY_GROUP_SCALE:  # no program's dtype is too small for a scale that nothing depends on
        scale = torch.where(extent > 0, scale, EMPTY_GROUP_SCALE)
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(low.dtype)
    if symmetric:
        return scale, torch.zeros_like(scale)
    return scale, _round_straight_through(-low / scale).clamp(0, highest_code)


def quantize(rows: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return the integer codes of rows, as float values ``[rows, columns]``."""
    return ((rows / scale).round() + zero_point).clamp(*code_range(bits, symmetric))
