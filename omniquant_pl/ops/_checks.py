"""What the operators accept. Kernels read raw memory, so every entry is checked."""

from torch import Tensor

__all__ = ["check_bits", "check_parameters", "check_rows", "check_same_rows"]

MAX_BITS = 16  # codes of 16 bits are exact in float32; nothing stores wider ones


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
