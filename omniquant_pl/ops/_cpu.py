"""CPU kernels over libomniquant; what it does not compute takes the torch default."""

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.ops import _default, _default_linear, _native
from omniquant_pl.ops._checks import (
    check_bits,
    check_codes,
    check_columns,
    check_packed_linear,
    check_parameters,
    check_rows,
    check_same_rows,
    check_words,
)
from omniquant_pl.ops._layouts import ELEMENT, LAYOUTS, UNIT, words_per_row
from omniquant_pl.ops._native import I32, I64, POINTER
from omniquant_pl.ops._threads import split_rows

__all__ = ["CpuKernels", "cpu_kernels"]

_HALVES = (torch.float16, torch.bfloat16)
_MAX_COLUMNS = 2**31 - 1
_PRODUCT_BITS = (2, 3, 4, 8)
MAX_TOKENS = 0  # of a packed product; 0 for as many as the kernel is faster for
WIDEST_VECTOR = 0  # in floats; 0 for the widest that the processor has


class CpuKernels:
    """The operators of `omniquant_pl.ops` on host memory.

    Fake quantization of float64 takes the torch default, static one of half precision too.

    Args:
        library: the loaded libomniquant.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        tail = (I64, I64, I64, I32, I32)  # columns, begin, end; quant_min, quant_max or bits, symmetric

        def declare(name: str, pointers: int) -> Any:
            return _native.declare(library, f"omniquant_{name}", [POINTER] * pointers + [*tail])

        self._forward = declare("fake_quantize", 4)
        self._backward = declare("fake_quantize_backward", 7)
        self._dynamic = declare("dynamic_fake_quantize", 2)
        self._dynamic_backward = declare("dynamic_fake_quantize_backward", 3)
        self._extremes = _native.declare(library, "omniquant_row_extremes", [*[POINTER] * 5, I64, I64, I64])
        packing = [POINTER, POINTER, I64, I64, I64, I64, I32, I32]
        self._pack = _native.declare(library, "omniquant_pack", packing)
        self._unpack = _native.declare(library, "omniquant_unpack", packing)
        product = [*[POINTER] * 6, I64, I64, I64, I64, *[I32] * 5]
        self._packed_linear = _native.declare(library, "omniquant_packed_linear", product)
        sizes = [I64, I64, I64, I32, I32]
        self._workspace = _native.declare(library, "omniquant_packed_linear_workspace", sizes, I64)
        self._limit = _native.declare(library, "omniquant_packed_linear_limit", [I32] * 3, I64)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """See `omniquant_pl.ops.fake_quantize`."""
        if x.dtype != torch.float32:
            return _default.fake_quantize(x, scale, zero_point, quant_min, quant_max)
        check_parameters(x, scale, zero_point, quant_min, quant_max)
        x, scale, zero_point = x.contiguous(), scale.contiguous(), zero_point.contiguous()
        result = torch.empty_like(x)
        _run(self._forward, (x, scale, zero_point, result), quant_min, quant_max)
        return result

    def fake_quantize_backward(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `omniquant_pl.ops.fake_quantize_backward`."""
        if x.dtype != torch.float32:
            return _default.fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max)
        check_same_rows(grad, x)
        check_parameters(x, scale, zero_point, quant_min, quant_max)
        inputs = [tensor.contiguous() for tensor in (grad, x, scale, zero_point)]
        grads = (
            torch.empty_like(inputs[1]),
            torch.empty_like(inputs[2]),
            torch.empty_like(inputs[3]),
        )
        _run(self._backward, (*inputs, *grads), quant_min, quant_max)
        return grads

    def dynamic_fake_quantize(self, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        """See `omniquant_pl.ops.dynamic_fake_quantize`."""
        if x.dtype in _HALVES:
            return self.dynamic_fake_quantize(x.float(), bits, symmetric).to(x.dtype)
        if x.dtype != torch.float32:
            return _default.dynamic_fake_quantize(x, bits, symmetric)
        check_rows(x)
        check_bits(bits)
        x = x.contiguous()
        result = torch.empty_like(x)
        _run(self._dynamic, (x, result), bits, symmetric)
        return result

    def dynamic_fake_quantize_backward(self, grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        """See `omniquant_pl.ops.dynamic_fake_quantize_backward`."""
        check_same_rows(grad, x)
        check_bits(bits)
        if x.dtype in _HALVES:
            wide = self.dynamic_fake_quantize_backward(grad.float(), x.float(), bits, symmetric)
            return wide.to(x.dtype)
        if x.dtype != torch.float32:
            return _default.dynamic_fake_quantize_backward(grad, x, bits, symmetric)
        grad, x = grad.contiguous(), x.contiguous()
        result = torch.empty_like(x)
        _run(self._dynamic_backward, (grad, x, result), bits, symmetric)
        return result

    def row_extremes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `omniquant_pl.ops.row_extremes`."""
        check_columns(x)
        if x.dtype != torch.float32 or x.shape[1] > _MAX_COLUMNS:
            return _default.row_extremes(x)
        x = x.contiguous()
        rows, columns = x.shape
        ends = x.new_empty((rows, 1)), x.new_empty((rows, 1))
        places = torch.empty((rows, 1), dtype=torch.int64), torch.empty((rows, 1), dtype=torch.int64)
        call = partial(self._extremes, *[tensor.data_ptr() for tensor in (x, *ends, *places)], columns)
        split_rows(call, rows, columns)
        return (*ends, *places)

    def pack(self, codes: Tensor, bits: int, layout: str) -> Tensor:
        """See `omniquant_pl.ops.pack`."""
        check_codes(codes, bits, layout)
        codes = codes.contiguous()
        rows, columns = codes.shape
        words = torch.empty((rows, words_per_row(columns, bits, layout)), dtype=torch.int32)
        call = partial(self._pack, codes.data_ptr(), words.data_ptr(), columns, words.shape[1])
        split_rows(lambda begin, end: call(begin, end, bits, LAYOUTS[layout]), rows, columns)
        return words

    def unpack(self, words: Tensor, bits: int, columns: int, layout: str) -> Tensor:
        """See `omniquant_pl.ops.unpack`."""
        check_words(words, bits, columns, layout)
        words = words.contiguous()
        codes = torch.empty((words.shape[0], columns), dtype=torch.uint8)
        call = partial(self._unpack, words.data_ptr(), codes.data_ptr(), columns, words.shape[1])
        split_rows(lambda begin, end: call(begin, end, bits, LAYOUTS[layout]), words.shape[0], columns)
        return codes

    def packed_linear(
        self, x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
    ) -> Tensor:
        """See `omniquant_pl.ops.packed_linear`."""
        check_packed_linear(x, words, scale, zero_point, bits, group_size)
        if not self._has_product(x, bits, group_size):
            return _default_linear.packed_linear(x, words, scale, zero_point, bits, group_size)
        tokens, columns = x.shape
        group_size = min(group_size, max(columns, 1))
        threads = torch.get_num_threads()
        operands = [None if each is None else each.contiguous() for each in (x, words, scale, zero_point)]
        result = x.new_empty((tokens, words.shape[0]))
        workspace = torch.empty(self._workspace(tokens, columns, group_size, bits, threads))
        self._packed_linear(
            *[None if each is None else each.data_ptr() for each in (*operands, result, workspace)],
            *(tokens, columns, words.shape[0], group_size),
            *(bits, ELEMENT[x.dtype], ELEMENT[scale.dtype], threads, WIDEST_VECTOR),
        )
        return result

    def _has_product(self, x: Tensor, bits: int, group_size: int) -> bool:
        whole_units = group_size % UNIT == 0 or group_size >= x.shape[1]
        if bits not in _PRODUCT_BITS or not whole_units:
            return False
        return x.shape[0] <= (MAX_TOKENS or self._limit(bits, ELEMENT[x.dtype], WIDEST_VECTOR))


def cpu_kernels() -> CpuKernels | None:
    """Load the CPU kernels.

    Returns:
        The kernels; None where libomniquant was not built.
    """
    library = _native.load("libomniquant")
    return CpuKernels(library) if library else None


def _run(function: Any, tensors: tuple[Tensor, ...], first: int, second: int) -> None:
    """Call a C function whose first tensor is [rows, columns], over all rows."""
    rows, columns = tensors[0].shape
    call = partial(function, *[tensor.data_ptr() for tensor in tensors], columns)
    split_rows(lambda begin, end: call(begin, end, first, second), rows, columns)
