"""How one quantized weight stands in a packed folder, and back; docs/packed-format.md says it to other readers."""

from __future__ import annotations

import torch
from torch import Tensor

from omniquant_pl import ops
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.quant.affine import group_size_of
from omniquant_pl.spec import WeightSpec

__all__ = ["PACKED", "SCALE", "ZERO_POINT", "Stored", "encode", "planes_of", "stored_tensors", "zero_points_of"]

PACKED, SCALE, ZERO_POINT = "packed", "scale", "zero_point"

Stored = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor in a file."""


def stored_tensors(spec: WeightSpec, shape: tuple[int, int]) -> dict[str, Stored]:
    """Return what a weight is stored as, by suffix.

    Args:
        spec: How it is quantized.
        shape: ``(out, in)``.
    """
    out_features, in_features = shape
    groups = -(-in_features // group_size_of(spec, in_features))
    if _fills_planes(in_features):
        words: tuple[int, ...] = (out_features, ops.words_per_row(in_features, spec.bits, "planes"))
    else:
        words = (ops.words_per_row(out_features * in_features, spec.bits, "stream"),)
    stored: dict[str, Stored] = {PACKED: (words, torch.int32)}
    stored[SCALE] = ((out_features, groups), getattr(torch, spec.scale_dtype))
    if not spec.symmetric:
        stored[ZERO_POINT] = ((ops.words_per_row(out_features * groups, spec.bits, "stream"),), torch.int32)
    return stored


def encode(weight: QuantizedWeight, spec: WeightSpec) -> dict[str, Tensor]:
    """Return the tensors that :func:`stored_tensors` announces.

    Args:
        weight: The codes; signed ones are stored with ``2 ** (bits - 1)`` added.
        spec: How it is quantized.
    """
    codes = weight.codes
    if weight.zero_point is None:
        codes = (codes.to(torch.int16) + 2 ** (spec.bits - 1)).to(torch.uint8)
    packed = ops.pack(codes, spec.bits, "planes") if _fills_planes(codes.shape[1]) else _stream(codes, spec.bits)
    tensors = {PACKED: packed, SCALE: weight.scale}
    if weight.zero_point is not None:
        tensors[ZERO_POINT] = _stream(weight.zero_point, spec.bits)
    return tensors


def planes_of(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Return the words that the packed product reads, int32 ``[out, words]``.

    Args:
        packed: As it is stored.
        bits: Code width.
        shape: ``(out, in)`` of the weight.
    """
    return packed if _fills_planes(shape[1]) else ops.pack(_from_stream(packed, bits, shape), bits, "planes")


def zero_points_of(stream: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Return zero points uint8 ``[out, groups]``.

    Args:
        stream: As they are stored.
        bits: Code width.
        shape: ``(out, groups)``.
    """
    return _from_stream(stream, bits, shape)


def _fills_planes(columns: int) -> bool:
    """Return whether rows of that many codes need no padding; others are stored as one bit stream."""
    return ops.padded_columns(columns) == columns


def _stream(values: Tensor, bits: int) -> Tensor:
    return ops.pack(values.reshape(1, -1), bits, "stream")[0]


def _from_stream(stream: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    return ops.unpack(stream[None], bits, shape[0] * shape[1], "stream").view(shape)
