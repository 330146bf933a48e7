"""Affine quantization, its straight-through gradients, clipping, searches, and GPTQ."""

from omniquant_pl.quant.affine import QuantizedWeight
from omniquant_pl.quant.clipping import RowRange, WeightQuantizer
from omniquant_pl.quant.fake_quantize import activation_quantizer, dynamic_fake_quantize, fake_quantize
from omniquant_pl.quant.gptq import gptq_codes
from omniquant_pl.quant.moments import InputMoment, InputSample, observe_moments, observe_samples
from omniquant_pl.quant.observers import ChannelRange, observe_inputs
from omniquant_pl.quant.search import (
    FULL_RANGE_LOGIT,
    activation_aware_scales,
    best_scale,
    clipping_logit,
    search_clipping,
)

__all__ = [
    "FULL_RANGE_LOGIT",
    "ChannelRange",
    "InputMoment",
    "InputSample",
    "QuantizedWeight",
    "RowRange",
    "WeightQuantizer",
    "activation_aware_scales",
    "activation_quantizer",
    "best_scale",
    "clipping_logit",
    "dynamic_fake_quantize",
    "fake_quantize",
    "gptq_codes",
    "observe_inputs",
    "observe_moments",
    "observe_samples",
    "search_clipping",
]
