"""How much memory this process has needed, and giving back what it does not."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from functools import cache

import torch

__all__ = ["make_room", "peak_memory", "return_free_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OWN_PAGES = 8 << 20


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most bytes that were in use so far, of the ``host`` and of the ``device``; 0 for a CPU device."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}


def return_free_memory() -> None:
    """Give memory that is free back to the system where the C library keeps it.

    Between blocks, whose tensors come and go, what is kept would become scattered and grow with the depth of the model.
    """
    _keep_large_tensors_apart()
    _call_libc("malloc_trim", 0)


def make_room() -> None:
    """Give everything back that is not in use, after something did not fit: cycles and the device's memory too."""
    gc.collect()
    return_free_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def _keep_large_tensors_apart() -> None:
    """Give tensors from 8 MiB on pages of their own, which go back to the system with the tensor.

    By itself glibc does so from 32 MiB on, once smaller ones have been freed, and puts those between them into holes
    that others have left, where they fit: how much is taken in the end is a matter of luck.
    """
    if _call_libc("mallopt", _M_MMAP_THRESHOLD, _OWN_PAGES):
        _call_libc("mallopt", _M_TRIM_THRESHOLD, 2 * _OWN_PAGES)


def _call_libc(name: str, *arguments: int) -> int:
    """Call a function of the C library, 0 where it has none of that name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    return 0 if function is None else int(function(*arguments))
