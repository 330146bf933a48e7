"""Codes as MLC-LLM's group quantization holds them, in its configuration ``q4f16_2``.

Read in mlc_llm/quantization/group_quantization.py: a weight is ``(q - 7) * scale`` with four bits for ``q``, eight of
them in a 32-bit word, the first in the lowest bits, and a float16 scale for every 32 input channels. Of the
configurations that MLC-LLM names, ``q4f16_2`` is the one that leaves the embedding and the head as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omniquant_pl import ops
from omniquant_pl.export.codes import unsigned_codes
from omniquant_pl.ops import code_range
from omniquant_pl.quant.affine import QuantizedWeight, group_size_of
from omniquant_pl.spec import WeightSpec

__all__ = ["GROUP", "pack_codes", "weight_refusal"]

GROUP = 32
"""Input channels that share a scale in the file."""

_BITS, _OFFSET = 4, 7


def weight_refusal(spec: WeightSpec, shape: tuple[int, ...]) -> str | None:
    """Return why a weight ``(out, in)`` does not fit without rounding, ``None`` if it does."""
    columns = shape[1]
    if spec.scale_dtype == "float32":
        return "scales are float16 there; set model.weights.scale_dtype to it"
    group = group_size_of(spec, columns)
    if group != columns and group % GROUP:
        return f"groups of {group} channels are not made of groups of {GROUP}"
    lowest, highest = code_range(spec.bits, spec.symmetric)
    reach = highest - (0 if spec.symmetric else lowest)
    if reach > _OFFSET:
        kind = "symmetric codes" if spec.symmetric else "codes with zero points"
        return f"{kind} of {spec.bits} bit do not fit its sixteen values; 2 and 3 bit do, and 4 bit symmetric"
    return None


def pack_codes(weight: QuantizedWeight, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Return words and scales of a weight that fits.

    There is room for -7 to 8, and symmetric codes of 4 bit go from -8 to 7: with codes and scale negated they fit.

    Args:
        weight: The weight.
        spec: How it is quantized.

    Returns:
        int32 ``[out, 4 * groups]``, whose bits are those of uint32, and float16 ``[out, groups]``, groups being of
        :data:`GROUP` channels.
    """
    columns = weight.codes.shape[1]
    groups = -(-columns // GROUP)
    group = torch.arange(groups) * GROUP // weight.group_size
    codes, zero_point = unsigned_codes(weight, spec.bits)
    values = codes.int() - zero_point.int().repeat_interleave(weight.group_size, dim=1)[:, :columns]
    sign = -1 if spec.symmetric else 1
    q = (sign * values + _OFFSET).to(torch.uint8)
    words = ops.pack(F.pad(q, (0, groups * GROUP - columns)), _BITS, "words")
    return words, sign * weight.scale[:, group].to(torch.float16)
