"""Compiled steps: ``torch.compile``, once for all blocks that are alike."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

from omniquant_pl.errors import ConfigurationError

__all__ = ["compiled", "refuse_without_compiler"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_CPU_COMPILERS = ("g++", "clang++", "c++")


@cache
def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Returns a function compiled for the shapes that it gets; arguments of the same structure share the code."""
    return torch.compile(function, dynamic=False)


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
