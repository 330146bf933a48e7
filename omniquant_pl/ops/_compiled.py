"""The compiled kernels by dispatch key, loaded once for all operators."""

from collections.abc import Mapping

from omniquant_pl.ops._cpu import cpu_kernels
from omniquant_pl.ops._cuda import cuda_kernels

__all__ = ["COMPILED"]

COMPILED: Mapping[str, object | None] = {"CPU": cpu_kernels(), "CUDA": cuda_kernels()}
