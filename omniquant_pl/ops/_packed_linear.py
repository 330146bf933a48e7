"""Product with packed weights: reads the codes from memory, not the weight."""

from typing import Any

from torch import Tensor

from omniquant_pl.ops import _default_linear
from omniquant_pl.ops._checks import check_packed_linear, check_packed_linear_backward
from omniquant_pl.ops._compiled import COMPILED
from omniquant_pl.ops._library import register, register_gradient

__all__ = ["packed_linear"]


def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Multiply tokens with a packed weight: `x @ weight.T`.

    weight[r, c] = (code[r, c] - zero_point[r, c // group_size]) * scale[r, c // group_size]. Sums are
    taken in float32. Differentiable with respect to `x` alone.

    Args:
        x: [tokens, columns], float32, float16 or bfloat16.
        words: [rows, words_per_row], int32: the codes, packed in planes.
        scale: [rows, groups], float32, float16 or bfloat16; groups = ceil(columns / group_size).
        zero_point: [rows, groups], uint8; None for symmetric codes, whose zero point is 2^(bits - 1).
        bits: code width, 1 to 8.
        group_size: columns (input channels) of a group; the last group may have fewer. `columns` or more: one
            scale a row (output channel).

    Returns:
        [tokens, rows], dtype of `x`, contiguous.

    Raises:
        ValueError: shapes or devices do not fit, or the width or the group size is out of range.
        TypeError: a dtype is another one.
    """
    result: Tensor = _packed_linear(x, words, scale, zero_point, bits, group_size)
    return result


def _fake(x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    check_packed_linear(x, words, scale, zero_point, bits, group_size)
    return x.new_empty((x.shape[0], words.shape[0]))


def _fake_backward(
    grad: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    check_packed_linear_backward(grad, words, scale, zero_point, bits, group_size, columns)
    return grad.new_empty((grad.shape[0], columns))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero_point, *ctx.numbers = inputs
    ctx.columns = x.shape[1]
    ctx.save_for_backward(words, scale, zero_point)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _packed_linear_backward(grad, *ctx.saved_tensors, *ctx.numbers, ctx.columns), None, None, None, None, None


_WEIGHT = "Tensor words, Tensor scale, Tensor? zero_point, int bits, int group_size"
_packed_linear = register(
    f"packed_linear(Tensor x, {_WEIGHT}) -> Tensor",
    default=_default_linear.packed_linear,
    fake=_fake,
    compiled=COMPILED,
)
_packed_linear_backward = register(
    f"packed_linear_backward(Tensor grad, {_WEIGHT}, SymInt columns) -> Tensor",
    default=_default_linear.packed_linear_backward,
    fake=_fake_backward,
    compiled={},
)
register_gradient("packed_linear", _gradient, keep=_keep_weight)
