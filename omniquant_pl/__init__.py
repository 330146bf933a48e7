"""OmniQuant post-training quantization of causal language models on PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omniquant_pl.api import quantize

__all__ = ["__version__", "quantize"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is asked for."""
    if name == "quantize":
        from omniquant_pl.api import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
