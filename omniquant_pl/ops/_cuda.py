"""CUDA kernels over libomniquant_cuda; what they do not compute takes the torch default."""

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.ops import _default, _native
from omniquant_pl.ops._checks import check_bits, check_parameters, check_rows, check_same_rows
from omniquant_pl.ops._cuda_launch import ELEMENT, launch
from omniquant_pl.ops._cuda_packed import PackedCudaKernels
from omniquant_pl.ops._native import I32, I64, POINTER

__all__ = ["CudaKernels", "cuda_kernels"]

_LOGGER = logging.getLogger(__name__)


class CudaKernels:
    """The operators of `omniquant_pl.ops` on device memory.

    float64, and devices that the library was not built for, take the torch default.

    Args:
        library: the loaded libomniquant_cuda.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        def declare(name: str, pointers: int, numbers: int) -> Any:
            arguments = [POINTER] * pointers + [I64, I64] + [I32] * numbers + [POINTER]
            return _native.declare(library, f"omniquant_cuda_{name}", arguments, I32)

        self._usable = _native.declare(library, "omniquant_cuda_usable", [], I32)
        self._forward = declare("fake_quantize", 4, 2)
        self._backward = declare("fake_quantize_backward", 7, 2)
        self._dynamic = declare("dynamic_fake_quantize", 2, 3)
        self._dynamic_backward = declare("dynamic_fake_quantize_backward", 3, 3)
        self._runs_on = cache(self._probe)
        packed = PackedCudaKernels(library, self._runs_on)
        self.pack, self.unpack, self.packed_linear = packed.pack, packed.unpack, packed.packed_linear

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """See `omniquant_pl.ops.fake_quantize`."""
        if x.dtype != torch.float32 or not self._runs_on(x.device):
            return _default.fake_quantize(x, scale, zero_point, quant_min, quant_max)
        check_parameters(x, scale, zero_point, quant_min, quant_max)
        x, scale, zero_point = x.contiguous(), scale.contiguous(), zero_point.contiguous()
        result = torch.empty_like(x)
        _launch(self._forward, (x, scale, zero_point, result), quant_min, quant_max)
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
        if x.dtype != torch.float32 or not self._runs_on(x.device):
            return _default.fake_quantize_backward(grad, x, scale, zero_point, quant_min, quant_max)
        check_same_rows(grad, x)
        check_parameters(x, scale, zero_point, quant_min, quant_max)
        inputs = [tensor.contiguous() for tensor in (grad, x, scale, zero_point)]
        grads = (
            torch.empty_like(inputs[1]),
            torch.empty_like(inputs[2]),
            torch.empty_like(inputs[3]),
        )
        _launch(self._backward, (*inputs, *grads), quant_min, quant_max)
        return grads

    def dynamic_fake_quantize(self, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        """See `omniquant_pl.ops.dynamic_fake_quantize`."""
        if x.dtype not in ELEMENT or not self._runs_on(x.device):
            return _default.dynamic_fake_quantize(x, bits, symmetric)
        check_rows(x)
        check_bits(bits)
        x = x.contiguous()
        result = torch.empty_like(x)
        _launch(self._dynamic, (x, result), bits, symmetric, ELEMENT[x.dtype])
        return result

    def dynamic_fake_quantize_backward(self, grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        """See `omniquant_pl.ops.dynamic_fake_quantize_backward`."""
        if x.dtype not in ELEMENT or not self._runs_on(x.device):
            return _default.dynamic_fake_quantize_backward(grad, x, bits, symmetric)
        check_same_rows(grad, x)
        check_bits(bits)
        grad, x = grad.contiguous(), x.contiguous()
        result = torch.empty_like(x)
        _launch(self._dynamic_backward, (grad, x, result), bits, symmetric, ELEMENT[x.dtype])
        return result

    def _probe(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            error = self._usable()
        if error:
            _LOGGER.warning("the CUDA kernels cannot run on %s: CUDA error %d", device, error)
        return not error


def cuda_kernels() -> CudaKernels | None:
    """Load the CUDA kernels; no CUDA context is made.

    Returns:
        The kernels; None where torch or libomniquant was built without CUDA.
    """
    if torch.version.cuda is None:
        return None
    library = _native.load("libomniquant_cuda")
    return CudaKernels(library) if library else None


def _launch(function: Any, tensors: tuple[Tensor, ...], *numbers: int) -> None:
    """Enqueue a C function whose first tensor is [rows, columns]."""
    pointers = [tensor.data_ptr() for tensor in tensors]
    launch(function, tensors[0].device, *pointers, *tensors[0].shape, *numbers)
