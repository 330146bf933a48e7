"""What quantized weights take on disk, whatever the file format."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from omniquant_pl.quant.affine import group_size_of
from omniquant_pl.spec import WeightSpec

__all__ = ["bits_per_weight", "overflowing_value", "stored_bits"]

_SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


def stored_bits(spec: WeightSpec, shape: tuple[int, ...]) -> int:
    """Return the bits of codes, scales and zero points of a weight ``(out, in)``, packed without padding."""
    out_features, in_features = shape
    groups = out_features * -(-in_features // group_size_of(spec, in_features))
    zero_point_bits = 0 if spec.symmetric else spec.bits
    return out_features * in_features * spec.bits + groups * (_SCALE_BITS[spec.scale_dtype] + zero_point_bits)


def bits_per_weight(weights: Iterable[tuple[WeightSpec, tuple[int, ...]]]) -> float:
    """Return the mean over weights of those specifications and shapes."""
    weights = list(weights)
    count = sum(out_features * in_features for _, (out_features, in_features) in weights)
    return sum(stored_bits(spec, shape) for spec, shape in weights) / count


def overflowing_value(tensor: Tensor, dtype: torch.dtype) -> float | None:
    """Return the value of largest magnitude if a floating-point dtype rounds it to infinity, ``None`` if it holds all.

    Args:
        tensor: Finite values, of any shape.
        dtype: What they are to be stored in.
    """
    if not (tensor.numel() and tensor.is_floating_point() and dtype.is_floating_point):
        return None
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return None
    lowest, highest = tensor.aminmax()
    largest = lowest if -lowest > highest else highest
    return float(largest) if bool(largest.to(dtype).isinf()) else None
