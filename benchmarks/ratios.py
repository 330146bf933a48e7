"""Ratios of times that were measured side by side, kept to see when one gets worse. Seconds are never kept."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

__all__ = ["compare_ratios", "store_ratios"]

PATH = Path(__file__).with_name("ratios.json")
TOLERANCE = 0.15


def store_ratios(ratios: Mapping[str, float], device: torch.device, folder: str | None) -> None:
    """Add ratios, higher is better, to those that are stored of this kind of device; a folder is not named."""
    stored, machine = _read(), _machine(device)
    command = shlex.join(["python", *("FOLDER" if each == folder else each for each in sys.argv)])
    origin = {"date": date.today().isoformat(), "command": command, "torch": torch.__version__}
    entries = {name: {"ratio": round(ratio, 3), **origin} for name, ratio in ratios.items()}
    stored[machine] = stored.get(machine, {}) | entries
    PATH.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def compare_ratios(ratios: Mapping[str, float], device: torch.device) -> None:
    """Warn of every ratio that has dropped by more than 15 % of the stored one; other devices say nothing."""
    machine = _machine(device)
    stored = _read().get(machine, {})
    for name, ratio in ratios.items():
        if name not in stored:
            print(f"{name}: {ratio:.2f}, nothing is stored of {machine}")
        elif ratio < (1 - TOLERANCE) * stored[name]["ratio"]:
            print(f"warning: {name}: {ratio:.2f}, was {stored[name]['ratio']:.2f} on {stored[name]['date']}")
        else:
            print(f"{name}: {ratio:.2f}, was {stored[name]['ratio']:.2f}")


def _machine(device: torch.device) -> str:
    """Return the kind of device: the GPU's name, or the processor's kind and its vectors."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _read() -> dict[str, dict[str, Any]]:
    return dict(json.loads(PATH.read_text())) if PATH.is_file() else {}
