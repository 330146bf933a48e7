"""Fake quantization of rows, fused: quantize and dequantize in one pass.

Source: OmniQuant (arXiv 2308.13137), section 3.2 for weights; per-token dynamic activations,
section 4.1. Straight-through rounding in both backwards.
"""

import torch
from torch import Tensor

from omniquant_pl.ops import _default
from omniquant_pl.ops._checks import check_bits, check_columns, check_parameters, check_rows, check_same_rows
from omniquant_pl.ops._compiled import COMPILED
from omniquant_pl.ops._library import register

__all__ = [
    "dynamic_fake_quantize",
    "dynamic_fake_quantize_backward",
    "fake_quantize",
    "fake_quantize_backward",
    "row_extremes",
]


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Round each row to its grid: `(clamp(round(x / scale) + zero_point) - zero_point) * scale`.

    Rounds half to even. Infinity saturates at the end of the grid; NaN stays NaN.

    Args:
        x: [rows, columns], float32 or float64.
        scale: [rows, 1], dtype of `x`, positive.
        zero_point: [rows, 1], dtype of `x`, integers.
        quant_min: smallest code.
        quant_max: largest code.

    Returns:
        [rows, columns], dtype of `x`, contiguous.

    Raises:
        ValueError: shapes or devices do not fit, or the code range is empty.
        TypeError: dtypes differ or are not floating-point.
    """
    result: Tensor = _fake_quantize(x, scale, zero_point, quant_min, quant_max)
    return result


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fake_quantize`, rounding counted as the identity.

    With t = x / scale and r = round(t), an element is inside when r + zero_point lies in the
    code range. Inside, x passes its gradient and the scale takes r - t; outside, the scale takes
    clamp(r + zero_point) - zero_point, and the zero point -scale.

    Args:
        grad: [rows, columns], gradient of the result, dtype of `x`.
        x: [rows, columns], float32 or float64.
        scale: [rows, 1], dtype of `x`.
        zero_point: [rows, 1], dtype of `x`.
        quant_min: smallest code.
        quant_max: largest code.

    Returns:
        Gradients of x [rows, columns], scale [rows, 1] and zero point [rows, 1].

    Raises:
        ValueError: shapes or devices do not fit, or the code range is empty.
        TypeError: dtypes differ or are not floating-point.
    """
    result: tuple[Tensor, Tensor, Tensor] = _fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max)
    return result


def row_extremes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lowest and highest value of each row, and where they stand: the first of equal ones.

    Of a row that holds a NaN both are NaN.

    Args:
        x: [rows, columns], floating-point.

    Returns:
        Lowest and highest values [rows, 1], dtype of `x`, and their columns [rows, 1], int64.

    Raises:
        ValueError: `x` is not 2-D, or has no columns.
        TypeError: `x` is not floating-point.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _row_extremes(x)
    return result


def dynamic_fake_quantize(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round each row to a grid made from its own extremes, as activations are per token.

    Asymmetric: scale = (max(x, 0) - min(x, 0)) / (2^bits - 1), unsigned codes. Symmetric:
    scale = max|x| / (2^(bits - 1) - 1), signed codes, no zero point. The scale is at least the
    smallest normal float32. A row with an infinity or a NaN comes back non-finite.

    Args:
        x: [rows, columns], float32 or float64; bfloat16 and float16 are computed in float32.
        bits: code width, 2 to 16.
        symmetric: which of the two grids.

    Returns:
        [rows, columns], dtype of `x`, contiguous.

    Raises:
        ValueError: `x` is not 2-D or `bits` is out of range.
        TypeError: `x` is not floating-point.
    """
    result: Tensor = _dynamic_fake_quantize(x, bits, symmetric)
    return result


def dynamic_fake_quantize_backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Gradient of `dynamic_fake_quantize`, rounding counted as the identity.

    It includes the way through the scale and the zero point to the row's extremes; equal
    extremes share it evenly, and an end of the range that is the constant zero takes none.

    Args:
        grad: [rows, columns], gradient of the result, dtype of `x`.
        x: [rows, columns], float32 or float64; bfloat16 and float16 are computed in float32.
        bits: code width, 2 to 16.
        symmetric: which of the two grids.

    Returns:
        [rows, columns], dtype of `x`, contiguous.

    Raises:
        ValueError: shapes do not fit or `bits` is out of range.
        TypeError: dtypes differ or are not floating-point.
    """
    result: Tensor = _dynamic_fake_quantize_backward(grad, x, bits, symmetric)
    return result


def _fake_like_x(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    check_parameters(x, scale, zero_point, quant_min, quant_max)
    return x.new_empty(x.shape)


def _fake_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_rows(grad, x)
    check_parameters(x, scale, zero_point, quant_min, quant_max)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _fake_dynamic(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    check_rows(x)
    check_bits(bits)
    return x.new_empty(x.shape)


def _fake_dynamic_backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    check_same_rows(grad, x)
    check_bits(bits)
    return x.new_empty(x.shape)


def _fake_extremes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_columns(x)
    shape = (x.shape[0], 1)
    ends, places = (x.new_empty(shape), x.new_empty(shape)), [x.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    return (*ends, places[0], places[1])


_STATIC = "Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max"
_fake_quantize = register(
    f"fake_quantize({_STATIC}) -> Tensor",
    default=_default.fake_quantize,
    fake=_fake_like_x,
    compiled=COMPILED,
)
_fake_quantize_backward = register(
    f"fake_quantize_backward(Tensor grad, {_STATIC}) -> (Tensor, Tensor, Tensor)",
    default=_default.fake_quantize_backward,
    fake=_fake_gradients,
    compiled=COMPILED,
)
_dynamic_fake_quantize = register(
    "dynamic_fake_quantize(Tensor x, int bits, bool symmetric) -> Tensor",
    default=_default.dynamic_fake_quantize,
    fake=_fake_dynamic,
    compiled=COMPILED,
)
_dynamic_fake_quantize_backward = register(
    "dynamic_fake_quantize_backward(Tensor grad, Tensor x, int bits, bool symmetric) -> Tensor",
    default=_default.dynamic_fake_quantize_backward,
    fake=_fake_dynamic_backward,
    compiled=COMPILED,
)
_row_extremes = register(
    "row_extremes(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default.row_extremes,
    fake=_fake_extremes,
    compiled={key: kernels for key, kernels in COMPILED.items() if key == "CPU"},
)
