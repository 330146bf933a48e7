"""`torch.library` operators over the compiled kernels, each with a pure-torch default and a fake kernel."""

from omniquant_pl.ops._default import code_range
from omniquant_pl.ops._fake_quantize import (
    dynamic_fake_quantize,
    dynamic_fake_quantize_backward,
    fake_quantize,
    fake_quantize_backward,
    row_extremes,
)
from omniquant_pl.ops._layouts import LAYOUTS, padded_columns, plane_widths, words_per_row
from omniquant_pl.ops._pack import pack, unpack
from omniquant_pl.ops._packed_linear import packed_linear

__all__ = [
    "LAYOUTS",
    "code_range",
    "dynamic_fake_quantize",
    "dynamic_fake_quantize_backward",
    "fake_quantize",
    "fake_quantize_backward",
    "pack",
    "packed_linear",
    "padded_columns",
    "plane_widths",
    "row_extremes",
    "unpack",
    "words_per_row",
]
