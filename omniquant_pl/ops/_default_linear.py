"""Pure-torch product with packed weights: a slice of the weight at a time is dequantized and multiplied.

A slice is some output channels, so that what is dequantized stays small however large the weight is.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from omniquant_pl.ops._checks import check_packed_linear, check_packed_linear_backward

__all__ = ["dequantize", "packed_linear", "packed_linear_backward"]

SLICE_ELEMENTS = 1 << 23


def dequantize(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, columns: int
) -> Tensor:
    """Return the weight as floating-point numbers.

    Args:
        words: [rows, words_per_row], int32, packed in planes.
        scale: [rows, groups], floating-point.
        zero_point: [rows, groups], uint8; None for 2^(bits - 1) everywhere.
        bits: code width, 1 to 8.
        group_size: columns of a group; the last group may have fewer.
        columns: columns of the weight.

    Returns:
        [rows, columns], float32.
    """
    weight: Tensor = torch.ops.omniquant_pl.unpack.default(words, bits, columns, "planes").float()
    whole = columns // group_size
    for begin, end in ((0, whole), (whole, scale.shape[1])):
        if begin < end:
            size = min(group_size, columns - begin * group_size)
            groups = weight[:, begin * group_size : end * group_size].unflatten(1, (end - begin, size))
            groups -= 2 ** (bits - 1) if zero_point is None else zero_point[:, begin:end, None].float()
            groups *= scale[:, begin:end, None].float()
    return weight


def packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """See `omniquant_pl.ops.packed_linear`."""
    check_packed_linear(x, words, scale, zero_point, bits, group_size)
    dtype = _product_dtype(x)
    result = x.new_empty((x.shape[0], words.shape[0]))
    rows = x.to(dtype)
    for part, weight in _slices(words, scale, zero_point, bits, group_size, x.shape[1]):
        result[:, part] = F.linear(rows, weight.to(dtype))
    return result


def packed_linear_backward(
    grad: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    """See `omniquant_pl.ops.packed_linear_backward`."""
    check_packed_linear_backward(grad, words, scale, zero_point, bits, group_size, columns)
    dtype = _product_dtype(grad)
    result = torch.zeros((grad.shape[0], columns), dtype=torch.float32, device=grad.device)
    grads = grad.to(dtype)
    for part, weight in _slices(words, scale, zero_point, bits, group_size, columns):
        result += grads[:, part] @ weight.to(dtype)
    return result.to(grad.dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Half precision is multiplied as it is where matrix units add in float32, on the host in float32."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _slices(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """Give output channels and their weight, [channels, columns] in float32."""
    step = max(SLICE_ELEMENTS // max(columns, 1), 1)
    for begin in range(0, words.shape[0], step):
        part = slice(begin, begin + step)
        zeros = None if zero_point is None else zero_point[part]
        yield part, dequantize(words[part], scale[part], zeros, bits, group_size, columns)
