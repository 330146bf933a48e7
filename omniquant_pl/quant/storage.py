"""What quantized weights take on disk, whatever the file format."""

from __future__ import annotations

from collections.abc import Iterable

from omniquant_pl.quant.affine import group_size_of
from omniquant_pl.spec import WeightSpec

__all__ = ["bits_per_weight", "stored_bits"]

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
