"""Modules that replace a block's own while it is calibrated: quantized linears, attention, experts."""

from omniquant_pl.nn.attention import ATTENTION, AttentionInputs
from omniquant_pl.nn.experts import UnfusedExperts
from omniquant_pl.nn.linear import QuantLinear
from omniquant_pl.nn.prepare import prepare_block, quantize_attention

__all__ = ["ATTENTION", "AttentionInputs", "QuantLinear", "UnfusedExperts", "prepare_block", "quantize_attention"]
