"""Pure-torch kernels: the definition of each operator, on every device.

The compiled kernels repeat this arithmetic operation by operation, so that the forward results
are equal bit for bit. In-place operations on fresh tensors only: half the memory traffic.
"""

import torch
from torch import Tensor

from omniquant_pl.ops._checks import check_bits, check_columns, check_parameters, check_rows, check_same_rows

__all__ = [
    "SCALE_FLOOR",
    "code_range",
    "dynamic_fake_quantize",
    "dynamic_fake_quantize_backward",
    "fake_quantize",
    "fake_quantize_backward",
    "row_extremes",
]

SCALE_FLOOR = torch.finfo(torch.float32).tiny
_HALVES = (torch.float16, torch.bfloat16)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code of a grid.

    Args:
        bits: code width.
        symmetric: signed codes around zero, or unsigned ones.

    Returns:
        Both ends, inclusive.
    """
    half = 2 ** (bits - 1)
    return (-half, half - 1) if symmetric else (0, 2 * half - 1)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """See `omniquant_pl.ops.fake_quantize`."""
    check_parameters(x, scale, zero_point, quant_min, quant_max)
    return _fake_quantize(x.contiguous(), scale, zero_point, quant_min, quant_max)


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    codes = (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)
    return codes.sub_(zero_point).mul_(scale)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `omniquant_pl.ops.fake_quantize_backward`."""
    check_same_rows(grad, x)
    check_parameters(x, scale, zero_point, quant_min, quant_max)
    return _fake_quantize_backward(grad.contiguous(), x.contiguous(), scale, zero_point, quant_min, quant_max)


def _fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    ratio = x / scale
    codes = ratio.round().add_(zero_point)
    clamped = codes.clamp(quant_min, quant_max)
    inside = _equal(codes, clamped)
    grad_x = grad * inside
    # [rows, columns]: (code - zero point), less the ratio where rounding passes its gradient
    slope = clamped.sub_(zero_point).sub_(ratio.mul_(inside))
    grad_scale = slope.mul_(grad).sum(dim=1, keepdim=True)
    grad_outside = (grad - grad_x).sum(dim=1, keepdim=True)
    return grad_x, grad_scale, grad_outside.mul_(scale).neg_()


def _equal(x: Tensor, y: Tensor) -> Tensor:
    # A mask of ones and zeros in x's dtype: on the CPU, bool tensors cost five times as much.
    return torch.eq(x, y, out=torch.empty_like(x))


def row_extremes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `omniquant_pl.ops.row_extremes`."""
    check_columns(x)
    (low, low_at), (high, high_at) = x.min(1, keepdim=True), x.max(1, keepdim=True)
    return low, high, low_at, high_at


def dynamic_fake_quantize(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """See `omniquant_pl.ops.dynamic_fake_quantize`."""
    check_rows(x)
    check_bits(bits)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    rows = _widened(x)
    scale, zero_point = _symmetric(rows, bits) if symmetric else _asymmetric(rows, bits)
    return _fake_quantize(rows, scale, zero_point, *code_range(bits, symmetric)).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    """Half-precision input, as autocast gives it, is computed in float32."""
    return (x.float() if x.dtype in _HALVES else x).contiguous()


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = _range_scale(x.abs().amax(dim=1, keepdim=True), 2 ** (bits - 1) - 1)
    return scale, torch.zeros_like(scale)


def _asymmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = _range_with_zero(x)
    levels = 2**bits - 1
    scale = _range_scale(high - low, levels)
    return scale, (-low / scale).round_().clamp_(0, levels)


def _range_scale(extent: Tensor, levels: int) -> Tensor:
    # CUDA divides by a Python number through its reciprocal, which is not the same number
    return (extent / extent.new_full((), levels)).clamp_(min=SCALE_FLOOR)


def _range_with_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    """End of each row's range, [rows, 1]; the range always contains zero."""
    return x.amin(dim=1, keepdim=True).clamp_(max=0.0), x.amax(dim=1, keepdim=True).clamp_(min=0.0)


def dynamic_fake_quantize_backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """See `omniquant_pl.ops.dynamic_fake_quantize_backward`."""
    check_same_rows(grad, x)
    check_bits(bits)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    backward = _symmetric_backward if symmetric else _asymmetric_backward
    return backward(_widened(grad), _widened(x), bits).to(x.dtype)


def _symmetric_backward(grad: Tensor, x: Tensor, bits: int) -> Tensor:
    magnitude = x.abs()
    highest = magnitude.amax(dim=1, keepdim=True)
    scale = _range_scale(highest, 2 ** (bits - 1) - 1)
    grad_x, grad_scale, _ = _fake_quantize_backward(grad, x, scale, torch.zeros_like(scale), *code_range(bits, True))
    grad_highest = _where(scale > SCALE_FLOOR, grad_scale).div_(2 ** (bits - 1) - 1)
    return grad_x.add_(_spread(_equal(magnitude, highest), grad_highest).mul_(x.sign()))


def _asymmetric_backward(grad: Tensor, x: Tensor, bits: int) -> Tensor:
    low, high = _range_with_zero(x)
    levels = 2**bits - 1
    scale = _range_scale(high - low, levels)
    free_zero = (-low / scale).round_()
    zero_point = free_zero.clamp(0, levels)
    grad_x, grad_scale, grad_zero = _fake_quantize_backward(grad, x, scale, zero_point, 0, levels)
    grad_zero = _where(free_zero == zero_point, grad_zero).div_(scale)
    grad_scale = grad_scale + grad_zero * (low / scale)
    grad_high = _where(scale > SCALE_FLOOR, grad_scale).div_(levels)
    grad_low = _where(low < 0, -grad_high - grad_zero)
    grad_x.add_(_spread(_equal(x, low), grad_low))
    return grad_x.add_(_spread(_equal(x, high), _where(high > 0, grad_high)))


def _where(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, value, 0.0)


def _spread(ties: Tensor, grad: Tensor) -> Tensor:
    """Share a row's gradient [rows, 1] evenly among its extremes, ones in ties [rows, columns]."""
    return ties.mul_(grad / ties.sum(dim=1, keepdim=True).clamp_(min=1))
