"""The families that are supported, one file each."""

from omniquant_pl.arch import llama as _llama
from omniquant_pl.arch import opt as _opt
from omniquant_pl.arch.layout import (
    BlockLayout,
    Experts,
    Family,
    attention_shape,
    family_of,
    register,
    registered_families,
)

__all__ = [
    "BlockLayout",
    "Experts",
    "Family",
    "attention_shape",
    "family_of",
    "register",
    "registered_families",
]

del _llama, _opt
