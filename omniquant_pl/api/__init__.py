"""The Python interface: quantizes a transformers model that is in memory."""

from omniquant_pl.api.quantization import quantize

__all__ = ["quantize"]
