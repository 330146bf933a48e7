"""Other tools, each behind the same small program: a model, tokens and a width in, a plain float32 model out.

``python -m omniquant_pl.compare.backends.with_gptqmodel --help`` shows one. The programs need torch, transformers and
their tool, nothing else of this package, so that they also run in an environment of the tool's own.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BACKENDS", "Backend"]


@dataclass(frozen=True)
class Backend:
    """A method of another tool."""

    name: str
    """What the method is called in results."""
    package: str
    """Distribution that has to be installed."""
    module: str
    """The program."""
    method: str
    """What the program is told to do, where its tool has several methods."""


BACKENDS = (
    Backend("auto-round", "auto-round", "omniquant_pl.compare.backends.with_auto_round", "signround"),
    Backend("gptqmodel", "gptqmodel", "omniquant_pl.compare.backends.with_gptqmodel", "gptq"),
    Backend("llm-compressor GPTQ", "llmcompressor", "omniquant_pl.compare.backends.with_llm_compressor", "gptq"),
    Backend("llm-compressor AWQ", "llmcompressor", "omniquant_pl.compare.backends.with_llm_compressor", "awq"),
)
"""Methods that quantize weights alone, asymmetric, to one width."""
