"""Affine quantization, its straight-through gradients, and the learnable clipping of weights."""

from omniquant_pl.quant.affine import QuantizedWeight
from omniquant_pl.quant.clipping import RowRange, WeightQuantizer
from omniquant_pl.quant.fake_quantize import dynamic_fake_quantize, fake_quantize
from omniquant_pl.quant.observers import ChannelRange, observe_inputs

__all__ = [
    "ChannelRange",
    "QuantizedWeight",
    "RowRange",
    "WeightQuantizer",
    "dynamic_fake_quantize",
    "fake_quantize",
    "observe_inputs",
]
