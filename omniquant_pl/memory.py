"""How much memory this process has needed, and giving back what it does not."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from functools import cache
from typing import Any

import torch

__all__ = ["make_room", "peak_memory", "return_free_memory"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the most bytes that were in use so far, of the ``host`` and of the ``device``; 0 for a CPU device."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}


def return_free_memory() -> None:
    """Frees what only cycles of references hold, and gives memory back to the system where the C library keeps it.

    Between blocks, whose tensors come and go, what is kept would become scattered and grow with the depth of the model.
    """
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def make_room() -> None:
    """Gives everything back that is not in use, the device's memory too, after something did not fit."""
    return_free_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
