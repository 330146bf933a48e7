"""The devices of this machine, for messages about one that it lacks."""

from __future__ import annotations

import torch

__all__ = ["devices_here"]


def devices_here() -> str:
    """Return the devices of this machine that PyTorch computes on, such as ``cpu, cuda:0 to cuda:3``."""
    names = ["cpu"]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names.append("cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}")
    if torch.backends.mps.is_available():
        names.append("mps")
    return ", ".join(names)
