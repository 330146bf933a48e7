"""The packed model: loading an exported folder, computing with its codes, generating text.

>>> from omniquant_pl.runtime import load_packed
>>> model = load_packed("runs/w4a4/packed")
"""

from omniquant_pl.runtime.generation import Generation, Sampling, generate
from omniquant_pl.runtime.linear import PackedLinear
from omniquant_pl.runtime.model import load_packed, usable_device
from omniquant_pl.runtime.report import generation_table, memory_line, weight_bytes, write_terminal

__all__ = [
    "Generation",
    "PackedLinear",
    "Sampling",
    "generate",
    "generation_table",
    "load_packed",
    "memory_line",
    "usable_device",
    "weight_bytes",
    "write_terminal",
]
