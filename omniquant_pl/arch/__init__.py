"""The families that are supported, one file each."""

from omniquant_pl.arch import llama as _llama
from omniquant_pl.arch.layout import (
    BlockLayout,
    attention_shape,
    layout_of,
    register,
    registered_families,
)

__all__ = ["BlockLayout", "attention_shape", "layout_of", "register", "registered_families"]

del _llama
