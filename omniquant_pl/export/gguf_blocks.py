"""Blocks of llama.cpp that hold our codes without rounding: which one, and their bytes.

A block holds so many consecutive weights of a row with a scale ``d``, in float16. Some types hold ``d * (q - offset)``.
The others, super-blocks, hold ``d * a * q - m * b * c`` with small integers ``a`` and ``c`` for every part of a block;
with ``a`` one, ``m`` equal to ``d``, ``b`` one and ``c`` the zero point that is our ``(code - zero_point) * scale``.
Layouts: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omniquant_pl.export.codes import unsigned_codes
from omniquant_pl.ops import code_range
from omniquant_pl.quant.affine import QuantizedWeight, group_size_of
from omniquant_pl.spec import WeightSpec

__all__ = ["BLOCK_TYPES", "BlockType", "exact_type"]

_Layout = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
"""Takes ``q [out, blocks, weights]``, scales as bytes ``[out, blocks, 2]``, zero points ``[out, blocks, 1]``, uint8;
returns parts ``[out, blocks, bytes]``, uint8, one after another in a block."""


@dataclass(frozen=True)
class BlockType:
    """One of llama.cpp's types.

    Attributes:
        name: As in ``GGMLQuantizationType``.
        weights: Weights of a block.
        bytes: Bytes of a block.
        bits: Width of ``q``.
        offset: What is subtracted from ``q``; ``None`` where the block has a zero point of its own.
    """

    name: str
    weights: int
    bytes: int
    bits: int
    offset: int | None
    layout: _Layout

    @property
    def bits_per_weight(self) -> float:
        """What a weight takes with its share of the scale."""
        return self.bytes * 8 / self.weights

    def holds(self, spec: WeightSpec, columns: int) -> bool:
        """Return whether weights with that many input channels fit without rounding."""
        group = group_size_of(spec, columns)
        aligned = columns % self.weights == 0 and (group == columns or group % self.weights == 0)
        if self.offset is None:
            return aligned and spec.bits <= self.bits
        lowest, highest = _reach(spec)
        return aligned and lowest >= -self.offset and highest < 2**self.bits - self.offset

    def pack(self, weight: QuantizedWeight, spec: WeightSpec) -> Tensor:
        """Return the bytes of a weight that it :meth:`holds`, uint8 ``[out, columns / weights * bytes]``."""
        rows, columns = weight.codes.shape
        blocks = columns // self.weights
        group = torch.arange(blocks) * self.weights // weight.group_size
        codes, zero_point = unsigned_codes(weight, spec.bits)
        if self.offset is not None:
            expanded = zero_point.repeat_interleave(weight.group_size, dim=1)[:, :columns]
            codes = (codes.int() - expanded.int() + self.offset).to(torch.uint8)
        scale = weight.scale.to(torch.float16).contiguous()[:, group, None].view(torch.uint8)
        parts = self.layout(codes.view(rows, blocks, self.weights), scale, zero_point[:, group, None])
        return torch.cat(parts, dim=2).view(rows, blocks * self.bytes)


def exact_type(spec: WeightSpec, columns: int) -> BlockType | None:
    """Return the smallest type that holds weights with that many input channels exactly, if there is one."""
    return next((found for found in BLOCK_TYPES if found.holds(spec, columns)), None)


def _reach(spec: WeightSpec) -> tuple[int, int]:
    """Lowest and highest ``code - zero_point``."""
    lowest, highest = code_range(spec.bits, spec.symmetric)
    return (lowest, highest) if spec.symmetric else (-highest, highest)


def _bits(q: Tensor, width: int, shift: int, bits: int, run: int) -> Tensor:
    """Put some bits of codes into bytes: byte ``i`` of a run has weights ``i``, ``i + run``, ``i + 2 * run``, ...

    Args:
        q: Codes ``[out, blocks, weights]``.
        width: Bits to take of a code.
        shift: Which bits: those from this one on.
        bits: Bits that a byte has for a weight.
        run: Bytes of a run; runs of a block follow each other.

    Returns:
        ``[out, blocks, weights * bits / 8]``, uint8.
    """
    taken = (q >> shift) & (2**width - 1)
    parts = taken.view(*q.shape[:2], -1, 8 // bits, run)
    places = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    joined: Tensor = (parts << places).sum(dim=3, dtype=torch.uint8)
    return joined.flatten(2)


def _low(q: Tensor, bits: int, run: int) -> Tensor:
    """Return the lowest bits of codes."""
    return _bits(q, bits, 0, bits, run)


def _high(q: Tensor, shift: int, bits: int, run: int) -> Tensor:
    """Return the bits of codes from one on."""
    return _bits(q, bits, shift, bits, run)


def _constant(like: Tensor, values: list[int]) -> Tensor:
    """Return the same bytes in every block."""
    return torch.tensor(values, dtype=torch.uint8).expand(*like.shape[:2], len(values))


def _q4_0(q: Tensor, scale: Tensor, _: Tensor) -> list[Tensor]:
    return [scale, _low(q, 4, 16)]


def _q5_0(q: Tensor, scale: Tensor, _: Tensor) -> list[Tensor]:
    return [scale, _high(q, 4, 1, 1), _low(q, 4, 16)]


def _q8_0(q: Tensor, scale: Tensor, _: Tensor) -> list[Tensor]:
    return [scale, q ^ 0x80]  # q - 128 as int8


def _q2_k(q: Tensor, scale: Tensor, zero_point: Tensor) -> list[Tensor]:
    factors = (1 | zero_point << 4).expand(-1, -1, 16)
    return [factors, _low(q, 2, 32), scale, scale]


def _q3_k(q: Tensor, scale: Tensor, _: Tensor) -> list[Tensor]:
    one = [0x11] * 8 + [0xAA] * 4  # sixteen times 1 + 32, in 6 bits: the low four of all, then the high two
    return [_high(q, 2, 1, 32), _low(q, 2, 32), _constant(q, one), scale]


def _minimum_factors(zero_point: Tensor) -> Tensor:
    """Eight factors of one and eight zero points in 6 bits each, as Q4_K and Q5_K have them: 12 bytes."""
    first = _constant(zero_point, [1] * 4)
    second = (zero_point | (zero_point >> 4) << 6).expand(-1, -1, 4)
    third = (1 | (zero_point & 15) << 4).expand(-1, -1, 4)
    return torch.cat((first, second, third), dim=2)


def _q4_k(q: Tensor, scale: Tensor, zero_point: Tensor) -> list[Tensor]:
    return [scale, scale, _minimum_factors(zero_point), _low(q, 4, 32)]


def _q5_k(q: Tensor, scale: Tensor, zero_point: Tensor) -> list[Tensor]:
    return [scale, scale, _minimum_factors(zero_point), _high(q, 4, 1, 32), _low(q, 4, 32)]


def _q6_k(q: Tensor, scale: Tensor, _: Tensor) -> list[Tensor]:
    return [_low(q, 4, 64), _high(q, 4, 2, 32), _constant(q, [1] * 16), scale]


BLOCK_TYPES = (
    BlockType("Q2_K", 256, 84, 2, None, _q2_k),
    BlockType("Q3_K", 256, 110, 3, 4, _q3_k),
    BlockType("Q4_0", 32, 18, 4, 8, _q4_0),
    BlockType("Q4_K", 256, 144, 4, None, _q4_k),
    BlockType("Q5_0", 32, 22, 5, 16, _q5_0),
    BlockType("Q5_K", 256, 176, 5, None, _q5_k),
    BlockType("Q6_K", 256, 210, 6, 32, _q6_k),
    BlockType("Q8_0", 32, 34, 8, 128, _q8_0),
)
"""The smallest first. Of two that take the same, the one whose products round activations in shorter blocks."""
