"""Fake quantization of a weight with learnable clipping, its gradient written out in one piece.

What autograd would chain through two dozen operations on small tensors is a few lines of algebra. With the clipped
range ``l = beta low``, ``h = gamma high``, the scale ``s = (h - l) / top`` and the zero point ``z = -l / s``, whose
rounding passes its gradient::

    dz/dl = -1 / s        dz/ds = l / s^2        ds/dh = 1 / top        ds/dl = -1 / top
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniquant_pl import ops
from omniquant_pl.ops import code_range
from omniquant_pl.quant.affine import scale_and_zero_point

__all__ = ["clipped_fake_quantize"]


class _ClippedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        upper: Tensor,
        lower: Tensor | None,
        full_range: tuple[Tensor, Tensor] | None,
        bits: int,
        symmetric: bool,
        smallest: float,
        offset: Tensor | None,
    ) -> Tensor:
        low_at = high_at = None
        if full_range is None:
            low, high, low_at, high_at = ops.row_extremes(rows)
            full_range = low.clamp_(max=0), high.clamp_(min=0)
        low, high = full_range
        gamma = torch.sigmoid(upper)
        beta = gamma if lower is None else torch.sigmoid(lower)
        scale, zero_point = scale_and_zero_point(low * beta, high * gamma, bits, symmetric, smallest)
        if offset is not None:
            rows = torch.addcmul(rows, offset, scale)
        ctx.save_for_backward(rows, scale, zero_point, low, high, gamma, beta, low_at, high_at, offset)
        ctx.bits, ctx.symmetric, ctx.smallest, ctx.is_shared = bits, symmetric, smallest, lower is None
        return ops.fake_quantize(rows, scale, zero_point, *code_range(bits, symmetric))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, zero_point, low, high, gamma, beta, low_at, high_at, offset = ctx.saved_tensors
        limits = code_range(ctx.bits, ctx.symmetric)
        grad_rows, grad_scale, grad_zero = ops.fake_quantize_backward(
            grad.contiguous(), rows, scale, zero_point, *limits
        )
        grad_offset = None
        if offset is not None:
            grad_offset = grad_rows * scale
            grad_scale = grad_scale + (grad_rows * offset).sum(1, keepdim=True)
        clipped_low = low * beta
        not_floored = scale > ctx.smallest
        if ctx.symmetric:
            grad_end = torch.where(not_floored, grad_scale / limits[1], 0.0)
            from_high = high * gamma >= -clipped_low
            grad_high, grad_low = torch.where(from_high, grad_end, 0.0), torch.where(from_high, 0.0, -grad_end)
        else:
            through_scale = grad_scale + (grad_zero / scale) * (clipped_low / scale)
            grad_high = torch.where(not_floored, through_scale / limits[1], 0.0)
            grad_low = -grad_zero / scale - grad_high
        if low_at is not None and ctx.needs_input_grad[0]:
            grad_rows.scatter_add_(1, low_at, torch.where(low < 0, grad_low * beta, 0.0))
            grad_rows.scatter_add_(1, high_at, torch.where(high > 0, grad_high * gamma, 0.0))
        grad_upper = grad_high * high * gamma * (1 - gamma)
        grad_lower = grad_low * low * beta * (1 - beta)
        if ctx.is_shared:
            return grad_rows, grad_upper + grad_lower, None, None, None, None, None, grad_offset
        return grad_rows, grad_upper, grad_lower, None, None, None, None, grad_offset


def clipped_fake_quantize(
    rows: Tensor,
    upper: Tensor,
    lower: Tensor | None,
    full_range: tuple[Tensor, Tensor] | None,
    bits: int,
    symmetric: bool,
    smallest: float,
    offset: Tensor | None = None,
) -> Tensor:
    """Fake-quantizes rows with the shares of their range that clipping keeps (OmniQuant, equation 2).

    Args:
        rows: Values ``[rows, columns]``, float32 or float64.
        upper: Logits ``[rows, 1]`` of the kept share of the upper end.
        lower: Logits ``[rows, 1]`` of the kept share of the lower end; ``None``: those of the upper end.
        full_range: Lowest (at most 0) and highest (at least 0) values ``[rows, 1]`` where they are constants; ``None``
            computes them from the rows and passes gradients to the extremes (to the first of equal ones).
        bits: Code width.
        symmetric: Signed codes and no zero point.
        smallest: The floor of scales, at which they have no gradient.
        offset: What is added to ``rows / scale`` before it is rounded, ``[rows, columns]``; ``None`` for nothing.

    Returns:
        ``[rows, columns]``, differentiable in rows, upper, lower and offset.
    """
    result: Tensor = _ClippedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        rows, upper, lower, full_range, bits, symmetric, smallest, offset
    )
    return result
