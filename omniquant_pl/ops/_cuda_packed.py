"""Packed codes on the device; what the kernels do not compute takes the torch default."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from omniquant_pl.ops import _default_linear, _default_pack, _native
from omniquant_pl.ops._checks import check_codes, check_packed_linear, check_words
from omniquant_pl.ops._cuda_launch import ELEMENT, launch
from omniquant_pl.ops._layouts import LAYOUTS, WORD_BITS, words_per_row
from omniquant_pl.ops._native import I32, I64, POINTER

__all__ = ["PackedCudaKernels"]

_BITS = (2, 3, 4, 8)
# The kernel reads the packed weight once for every 16 tokens; dequantizing moves about 30 bytes an
# element of the weight, once, before the product.
_MAX_TOKENS = 64
_MAX_COLUMNS = 1 << 24
_MAX_ROWS = 1 << 19


class PackedCudaKernels:
    """The operators on packed codes.

    Args:
        library: the loaded libomniquant_cuda.
        runs_on: whether a device can run its kernels.
    """

    def __init__(self, library: ctypes.CDLL, runs_on: Callable[[torch.device], bool]) -> None:
        packing = [POINTER] * 2 + [I64] * 3 + [I32] * 2 + [POINTER]
        self._pack = _native.declare(library, "omniquant_cuda_pack", packing, I32)
        self._unpack = _native.declare(library, "omniquant_cuda_unpack", packing, I32)
        product = [POINTER] * 5 + [I64] * 4 + [I32] * 3 + [POINTER]
        self._packed_linear = _native.declare(library, "omniquant_cuda_packed_linear", product, I32)
        self._runs_on = runs_on

    def pack(self, codes: Tensor, bits: int, layout: str) -> Tensor:
        """See `omniquant_pl.ops.pack`."""
        if not self._runs_on(codes.device):
            return _default_pack.pack(codes, bits, layout)
        check_codes(codes, bits, layout)
        codes = codes.contiguous()
        rows, columns = codes.shape
        words = codes.new_empty((rows, words_per_row(columns, bits, layout)), dtype=torch.int32)
        sizes = (rows, columns, words.shape[1])
        launch(self._pack, codes.device, codes.data_ptr(), words.data_ptr(), *sizes, bits, LAYOUTS[layout])
        return words

    def unpack(self, words: Tensor, bits: int, columns: int, layout: str) -> Tensor:
        """See `omniquant_pl.ops.unpack`."""
        if not self._runs_on(words.device):
            return _default_pack.unpack(words, bits, columns, layout)
        check_words(words, bits, columns, layout)
        words = words.contiguous()
        codes = words.new_empty((words.shape[0], columns), dtype=torch.uint8)
        sizes = (words.shape[0], columns, words.shape[1])
        launch(self._unpack, words.device, words.data_ptr(), codes.data_ptr(), *sizes, bits, LAYOUTS[layout])
        return codes

    def packed_linear(
        self, x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
    ) -> Tensor:
        """See `omniquant_pl.ops.packed_linear`."""
        check_packed_linear(x, words, scale, zero_point, bits, group_size)
        if not (_computes(x, words, bits, group_size) and self._runs_on(x.device)):
            return _default_linear.packed_linear(x, words, scale, zero_point, bits, group_size)
        x, words, scale = x.contiguous(), words.contiguous(), scale.contiguous()
        zeros = None if zero_point is None else zero_point.contiguous()
        result = x.new_empty((x.shape[0], words.shape[0]))
        launch(
            self._packed_linear,
            x.device,
            x.data_ptr(),
            words.data_ptr(),
            scale.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            result.data_ptr(),
            *(x.shape[0], x.shape[1], words.shape[0], group_size),
            *(bits, ELEMENT[x.dtype], ELEMENT[scale.dtype]),
        )
        return result


def _computes(x: Tensor, words: Tensor, bits: int, group_size: int) -> bool:
    tokens, columns = x.shape
    return (
        bits in _BITS
        and tokens <= _MAX_TOKENS
        and 0 < columns <= _MAX_COLUMNS
        and words.shape[0] <= _MAX_ROWS
        and (group_size % WORD_BITS == 0 or group_size >= columns)
    )
