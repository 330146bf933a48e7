"""Codes as packed formats hold them: without a sign, with a zero point for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from omniquant_pl.quant import QuantizedWeight

__all__ = ["unsigned_codes"]


def unsigned_codes(weight: QuantizedWeight, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes without a sign and their zero points; symmetric codes are moved up by half their range.

    Args:
        weight: Codes of either kind.
        bits: Their width.

    Returns:
        Codes ``[out, in]`` and zero points ``[out, groups]``, uint8.
    """
    if weight.zero_point is not None:
        return weight.codes, weight.zero_point
    half = 2 ** (bits - 1)
    zero_point = torch.full_like(weight.scale, half, dtype=torch.uint8)
    return (weight.codes.int() + half).to(torch.uint8), zero_point
