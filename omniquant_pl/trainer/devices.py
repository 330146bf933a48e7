"""Devices that a configuration asks for and this machine lacks, refused with those that it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.utils.devices import devices_here

__all__ = ["check_devices", "lightning_refusal"]

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def check_devices(options: Mapping[str, Any]) -> None:
    """Refuse devices that are not here, before Lightning looks for them.

    Raises:
        ConfigurationError: It names the key, and the devices of this machine.
    """
    accelerator, devices = options.get("accelerator", "auto"), options.get("devices", "auto")
    if isinstance(accelerator, str):
        _check_accelerator(accelerator)
        _check_count(accelerator, devices)


def _check_accelerator(name: str) -> None:
    kind, _, index = name.partition(":")
    if kind in ("cuda", "gpu", "mps") and index.isdigit():
        message = f"{name} is not accepted; for that device set it to gpu, and trainer.devices to [{index}]"
        raise ConfigurationError("trainer.accelerator", message)
    if name not in _ACCELERATORS:
        message = (
            f"{name} is not accepted; expected {', '.join(_ACCELERATORS)}; devices of this machine: {devices_here()}"
        )
        raise ConfigurationError("trainer.accelerator", message)
    has_mps = torch.backends.mps.is_available()
    is_missing = {"gpu": not (_cuda_devices() or has_mps), "cuda": not _cuda_devices(), "mps": not has_mps}
    if is_missing.get(name, False):
        reason = "" if name == "mps" or torch.version.cuda else " (this PyTorch is built without CUDA)"
        message = f"PyTorch finds no device of the kind {name}{reason}; devices of this machine: {devices_here()}"
        raise ConfigurationError("trainer.accelerator", message)


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_count(accelerator: str, devices: Any) -> None:
    wanted = _numbers(devices)
    if wanted is None:
        return
    if isinstance(wanted, int) and (wanted == 0 or wanted < -1):
        raise ConfigurationError("trainer.devices", f"{wanted} is not a positive number of devices, nor -1 for all")
    present = 0 if accelerator == "cpu" else _cuda_devices()
    if not present:  # processes of one processor may be any number, and Apple has one device
        if wanted == -1:
            raise ConfigurationError(
                "trainer.devices", "-1 means all GPUs, and the calibration is on the CPU; say how many processes"
            )
        return
    is_there = wanted <= present if isinstance(wanted, int) else all(index < present for index in wanted)
    if not is_there:
        raise ConfigurationError("trainer.devices", f"{devices} is more than is here: {devices_here()}")


def _numbers(devices: Any) -> int | list[int] | None:
    """Return a number of devices, their indices, or ``None`` of a setting that chooses by itself."""
    if isinstance(devices, list):
        return [int(index) for index in devices]
    text = str(devices).strip()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"\[?\s*\d+(\s*,\s*\d*)*\s*\]?", text):
        return [int(index) for index in re.findall(r"\d+", text)]
    if text == "auto":
        return None
    raise ConfigurationError(
        "trainer.devices", f"{text} is not accepted; expected a number, indices such as [0, 1], auto"
    )


def lightning_refusal(error: Exception, options: Mapping[str, Any]) -> ConfigurationError:
    """Return what Lightning says of an option, in one line, with the key of the option that it is about."""
    message = " ".join(str(error).split())
    words = re.findall(r"\w+", message)
    names = [name for name in options if name in words]
    key = f"trainer.{max(names, key=len)}" if names else "trainer"
    return ConfigurationError(key, message.replace("`", ""))
