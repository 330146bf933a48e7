"""What the operators accept. Kernels read raw memory, so every entry is checked."""

import torch
from torch import Tensor

from omniquant_pl.ops._layouts import LAYOUTS, words_per_row

__all__ = [
    "check_bits",
    "check_codes",
    "check_columns",
    "check_packed_linear",
    "check_packed_linear_backward",
    "check_parameters",
    "check_rows",
    "check_same_rows",
    "check_words",
]

MAX_BITS = 16  # codes of 16 bits are exact in float32; nothing stores wider ones
MAX_PACKED_BITS = 8
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_rows(x: Tensor) -> None:
    """Refuse what is not a matrix of floating-point rows.

    Raises:
        ValueError: `x` is not 2-D.
        TypeError: `x` is not a floating-point tensor.
    """
    if x.dim() != 2:
        raise ValueError(f"expected x as [rows, columns], got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point x, got {x.dtype}")


def check_columns(x: Tensor) -> None:
    """Refuse rows that have no extremes.

    Raises:
        ValueError: `x` is not 2-D, or has no columns.
        TypeError: `x` is not a floating-point tensor.
    """
    check_rows(x)
    if x.shape[1] == 0:
        raise ValueError(f"expected at least one column, got shape {list(x.shape)}")


def check_same_rows(grad: Tensor, x: Tensor) -> None:
    """Refuse a gradient that does not belong to `x`.

    Raises:
        ValueError: shape or device differs.
        TypeError: dtype differs.
    """
    check_rows(x)
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"expected grad like x, {list(x.shape)} on {x.device}, got {list(grad.shape)} on {grad.device}"
        )
    if grad.dtype != x.dtype:
        raise TypeError(f"expected grad and x of one dtype, got {grad.dtype} and {x.dtype}")


def check_parameters(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    """Refuse scales and zero points that do not fit the rows of `x`.

    Raises:
        ValueError: a shape or device differs, or `quant_min >= quant_max`.
        TypeError: a dtype differs.
    """
    check_rows(x)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.dim() != 2 or tensor.shape[0] != x.shape[0] or tensor.shape[1] != 1:
            raise ValueError(f"expected {name} as [{x.shape[0]}, 1], got {list(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"expected {name} as {x.dtype} like x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"expected {name} on {x.device} like x, got {tensor.device}")
    if quant_min >= quant_max:
        raise ValueError(f"expected quant_min < quant_max, got {quant_min} and {quant_max}")


def check_bits(bits: int) -> None:
    """Refuse a code width that has no grid.

    Raises:
        ValueError: `bits` is outside 2 to 16.
    """
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"expected bits from 2 to {MAX_BITS}, got {bits}")


def check_codes(codes: Tensor, bits: int, layout: str) -> None:
    """Refuse what cannot be packed.

    Raises:
        ValueError: `codes` is not 2-D, or the width or the layout is unknown.
        TypeError: `codes` is not uint8.
    """
    _check_layout(bits, layout)
    _check_matrix("codes", codes, torch.uint8)


def check_words(words: Tensor, bits: int, columns: int, layout: str) -> None:
    """Refuse words that are not `columns` codes a row.

    Raises:
        ValueError: `words` is not 2-D or of another length, or the width or the layout is unknown.
        TypeError: `words` is not int32.
    """
    _check_layout(bits, layout)
    _check_matrix("words", words, torch.int32)
    if columns < 0:
        raise ValueError(f"expected columns of at least 0, got {columns}")
    expected = words_per_row(columns, bits, layout)
    if words.shape[1] != expected:
        raise ValueError(
            f"expected {expected} words for {columns} columns of {bits} bit in {layout}, got {words.shape[1]}"
        )


def check_packed_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> None:
    """Refuse the arguments of a packed product that do not fit each other.

    Raises:
        ValueError: a shape or device differs, or the width or the group size is out of range.
        TypeError: a dtype is another one.
    """
    _check_floats("x", x)
    _check_weight(x, words, scale, zero_point, bits, group_size, x.shape[1])


def check_packed_linear_backward(
    grad: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> None:
    """Refuse a gradient that is not that of a packed product.

    Raises:
        ValueError: a shape or device differs, or the width or the group size is out of range.
        TypeError: a dtype is another one.
    """
    _check_floats("grad", grad)
    _check_weight(grad, words, scale, zero_point, bits, group_size, columns)
    if grad.shape[1] != words.shape[0]:
        raise ValueError(f"expected grad as [tokens, {words.shape[0]}], got {list(grad.shape)}")


def _check_weight(
    like: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> None:
    check_words(words, bits, columns, "planes")
    _check_floats("scale", scale)
    if group_size < 1:
        raise ValueError(f"expected group_size of at least 1, got {group_size}")
    others = {"words": words, "scale": scale}
    if zero_point is not None:
        _check_matrix("zero_point", zero_point, torch.uint8)
        others["zero_point"] = zero_point
    shape = [words.shape[0], -(-columns // group_size)]
    for name, tensor in others.items():
        if name != "words" and list(tensor.shape) != shape:
            raise ValueError(f"expected {name} as {shape}, got {list(tensor.shape)}")
        if tensor.device != like.device:
            raise ValueError(f"expected {name} on {like.device} like the rows, got {tensor.device}")


def _check_layout(bits: int, layout: str) -> None:
    if not 1 <= bits <= MAX_PACKED_BITS:
        raise ValueError(f"expected bits from 1 to {MAX_PACKED_BITS}, got {bits}")
    if layout not in LAYOUTS:
        raise ValueError(f"expected layout as one of {', '.join(LAYOUTS)}, got {layout!r}")


def _check_matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"expected {name} as [rows, columns], got shape {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"expected {name} as {dtype}, got {tensor.dtype}")


def _check_floats(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"expected {name} as [rows, columns], got shape {list(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"expected {name} as float32, float16 or bfloat16, got {tensor.dtype}")
