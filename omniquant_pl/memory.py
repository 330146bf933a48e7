"""How much memory this process has needed."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["peak_memory"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the most bytes that were in use so far, of the ``host`` and of the ``device``; 0 for a CPU device."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}
