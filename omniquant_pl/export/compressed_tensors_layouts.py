"""How compressed-tensors stores a weight: codes packed in words, or a byte each.

Read in compressed-tensors 0.20 (``compressors/pack_quantized``, ``compressors/naive_quantized``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omniquant_pl import ops
from omniquant_pl.export.codes import unsigned_codes
from omniquant_pl.export.folded import LinearWeight
from omniquant_pl.export.safetensors import Stored
from omniquant_pl.quant.affine import QuantizedWeight, group_size_of

__all__ = ["IntQuantized", "PackQuantized"]


@dataclass(frozen=True)
class PackQuantized:
    """Codes without a sign as one little-endian bit stream a row, zero points as one a column.

    Attributes:
        scale_dtype: What scales are stored in; ``None`` for their own.
    """

    scale_dtype: torch.dtype | None = None
    name: ClassVar[str] = "pack-quantized"

    def scale_dtype_of(self, linear: LinearWeight) -> torch.dtype:
        """Return what a weight's scales are stored in."""
        return self.scale_dtype or _scale_dtype(linear)

    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        """Return shapes and dtypes of what :meth:`pack` returns."""
        (rows, columns), bits = linear.shape, linear.spec.bits
        groups = _groups(linear)
        stored = {
            "weight_packed": ((rows, ops.words_per_row(columns, bits, "stream")), torch.int32),
            "weight_scale": ((rows, groups), self.scale_dtype_of(linear)),
            "weight_shape": ((2,), torch.int64),
        }
        if not linear.spec.symmetric:
            stored["weight_zero_point"] = ((ops.words_per_row(rows, bits, "stream"), groups), torch.int32)
        return stored

    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        """Return the tensors of one weight."""
        bits = linear.spec.bits
        codes, zero_point = unsigned_codes(weight, bits)
        tensors = {
            "weight_packed": ops.pack(codes, bits, "stream"),
            "weight_scale": weight.scale.to(self.scale_dtype_of(linear)),
            "weight_shape": torch.tensor(linear.shape),
        }
        if not linear.spec.symmetric:
            tensors["weight_zero_point"] = ops.pack(zero_point.T.contiguous(), bits, "stream").T.contiguous()
        return tensors


@dataclass(frozen=True)
class IntQuantized:
    """Codes and zero points in int8, less half the range of the codes."""

    name: ClassVar[str] = "int-quantized"

    def scale_dtype_of(self, linear: LinearWeight) -> torch.dtype:
        """Return what a weight's scales are stored in."""
        return _scale_dtype(linear)

    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        """Return shapes and dtypes of what :meth:`pack` returns."""
        per_group = (linear.shape[0], _groups(linear))
        stored: dict[str, Stored] = {
            "weight": (linear.shape, torch.int8),
            "weight_scale": (per_group, self.scale_dtype_of(linear)),
        }
        return stored if linear.spec.symmetric else stored | {"weight_zero_point": (per_group, torch.int8)}

    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        """Return the tensors of one weight."""
        if weight.zero_point is None:
            return {"weight": weight.codes, "weight_scale": weight.scale}
        half = 2 ** (linear.spec.bits - 1)
        codes, zero_point = ((tensor.int() - half).to(torch.int8) for tensor in (weight.codes, weight.zero_point))
        return {"weight": codes, "weight_scale": weight.scale, "weight_zero_point": zero_point}


def _groups(linear: LinearWeight) -> int:
    columns = linear.shape[1]
    return columns // group_size_of(linear.spec, columns)


def _scale_dtype(linear: LinearWeight) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, linear.spec.scale_dtype)
    return dtype
