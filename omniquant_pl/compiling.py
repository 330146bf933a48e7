"""Compiled steps: ``torch.compile``, once for all blocks that are alike."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from omniquant_pl.errors import ConfigurationError

__all__ = ["are_close", "compiled", "refuse_without_compiler"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_TOLERANCE = 0.1
"""Of the norm: where activations are quantized, values at the border of two codes make up to 0.02."""
_CPU_COMPILERS = ("g++", "clang++", "c++")


@cache
def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Returns a function compiled for the shapes that it gets; arguments of the same structure share the code."""
    return torch.compile(function, dynamic=False)


def are_close(plain: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether gradients, taken together, are the same but for rounding."""
    distance = norm = 0.0
    for one, two in zip(plain, other, strict=True):
        if one is None or two is None:
            if one is not two:
                return False
            continue
        distance += float((one - two).double().square().sum())
        norm += float(one.double().square().sum())
    return distance <= _TOLERANCE**2 * norm  # false also of what is not a number


def refuse_without_compiler(device: torch.device) -> None:
    """Refuses to compile where ``torch.compile`` has nothing to compile with.

    Raises:
        ConfigurationError: If there is no C++ compiler for the CPU, or no Triton for another device.
    """
    if device.type == "cpu":
        asked = os.environ.get("CXX")
        if not any(shutil.which(name) for name in ([asked] if asked else _CPU_COMPILERS)):
            wanted = f"CXX={asked} is not found" if asked else f"none of {', '.join(_CPU_COMPILERS)} is found"
            raise ConfigurationError(
                "model.compile", f"it needs a C++ compiler, and {wanted}; install one, or say false"
            )
    elif importlib.util.find_spec("triton") is None:
        raise ConfigurationError(
            "model.compile", f"it needs the package triton on {device.type}; install it, or say false"
        )
