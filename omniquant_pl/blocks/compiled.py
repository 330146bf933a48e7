"""Compiled steps: ``torch.compile``, once for all blocks that are alike."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from omniquant_pl.errors import ConfigurationError

__all__ = ["check_compiler", "compiled", "differing_kinds"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_TOLERANCE = 0.1
"""Of the norm: where activations are quantized, values at the border of two codes make up to 0.02."""
_CPU_COMPILER = "clang++" if sys.platform == "darwin" else "g++"
"""What ``torch.compile`` takes where ``CXX`` says nothing."""


@cache
def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function compiled for the shapes that it gets; arguments of the same structure share the code."""
    return torch.compile(function, dynamic=False)


def differing_kinds(plain: Sequence[Tensor | None], other: Sequence[Tensor | None], kinds: Sequence[str]) -> list[str]:
    """Return the kinds of gradients that are not the same but for rounding, all of a kind taken together.

    Args:
        plain: Gradients; ``None`` of what has none.
        other: The same, computed otherwise.
        kinds: What each of them belongs to.
    """
    distances, norms = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)
    for one, two, kind in zip(plain, other, kinds, strict=True):
        if one is not None and two is not None and bool(torch.isfinite(one).all()):
            distances[kind] += float(torch.linalg.vector_norm(one - two)) ** 2
            norms[kind] += float(torch.linalg.vector_norm(one)) ** 2
        elif one is not two and (one is None or two is None):
            distances[kind] = torch.inf
    # Not "greater": a distance that is not a number counts as well.
    return [kind for kind, distance in distances.items() if not distance <= _TOLERANCE**2 * norms[kind]]


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where ``torch.compile`` has nothing to compile with.

    Raises:
        ConfigurationError: If there is no C++ compiler for the CPU, or no Triton for another device.
    """
    if device.type == "cpu":
        asked = os.environ.get("CXX")
        if shutil.which(asked or _CPU_COMPILER) is None:
            wanted = f"CXX={asked} is not found" if asked else f"{_CPU_COMPILER} is not found"
            raise ConfigurationError(
                "model.learning.compile", f"it needs a C++ compiler, and {wanted}; install one, or say false"
            )
    elif importlib.util.find_spec("triton") is None:
        raise ConfigurationError(
            "model.learning.compile", f"it needs the package triton on {device.type}; install it, or say false"
        )
