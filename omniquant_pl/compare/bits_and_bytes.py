"""NF4 and LLM.int8() of bitsandbytes, as blocks whose linears are its own."""

from __future__ import annotations

import importlib.util
import time
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from omniquant_pl.checkpoint import BlockCall, SourceModel
from omniquant_pl.evaluate import CalledBlock

__all__ = ["KINDS", "BitsAndBytesBlocks", "is_installed"]

KINDS = {"nf4": "NF4", "int8": "LLM.int8()"}
"""Titles of the methods by name."""

_OUTLIERS = 6.0  # input channels that reach it stay in 16 bit: LLM.int8(), arXiv 2208.07339


def is_installed() -> bool:
    """Return whether bitsandbytes is there; it is not imported."""
    return importlib.util.find_spec("bitsandbytes") is not None


class BitsAndBytesBlocks:
    """Builds blocks with the linears of bitsandbytes; the defaults of transformers' ``BitsAndBytesConfig``.

    Args:
        source: The model.
        kind: ``nf4`` (4-bit NormalFloat, blocks of 64, arXiv 2305.14314) or ``int8`` (8 bit per row of weights and per
            token, arXiv 2208.07339).
        device: Where the linears are quantized.

    Attributes:
        stored_bits: Bits of codes and scales by the linear's name in the model.
        weights: Number of weights likewise.
        seconds: Spent on quantizing; blocks that are built once more are not counted.
    """

    def __init__(self, source: SourceModel, kind: str, device: torch.device) -> None:
        import_module("bitsandbytes")  # slow, and no part of quantizing
        self._source = source
        self._make = {"nf4": _nf4, "int8": _int8}[kind]
        self._device = device
        self.stored_bits: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.seconds = 0.0

    def __call__(self, index: int, tensors: dict[str, Tensor], call: BlockCall) -> nn.Module:
        """Return the block; see :data:`omniquant_pl.evaluate.perplexity.BlockBuilder`."""
        started, is_new = time.perf_counter(), True
        block = self._source.make_block(index, tensors)
        for name in self._source.layouts[index].linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            quantized, bits = self._make(linear, self._device)
            block.set_submodule(name, quantized)
            key = f"{self._source.block_prefix(index)}{name}"
            is_new = key not in self.stored_bits
            self.stored_bits[key], self.weights[key] = bits, linear.weight.numel()
        self.seconds += time.perf_counter() - started if is_new else 0.0
        return CalledBlock(block, call)


def _nf4(linear: nn.Linear, device: torch.device) -> tuple[nn.Module, int]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized: Any = _empty(linear, Linear4bit, quant_type="nf4", compress_statistics=False)
    weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
    quantized.weight = weight.to(device)
    return quantized, 8 * (quantized.weight.nbytes + quantized.weight.quant_state.absmax.nbytes)


def _int8(linear: nn.Linear, device: torch.device) -> tuple[nn.Module, int]:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    quantized: Any = _empty(linear, Linear8bitLt, has_fp16_weights=False, threshold=_OUTLIERS)
    quantized.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False).to(device)
    return quantized, 8 * (quantized.weight.nbytes + quantized.weight.SCB.nbytes)


def _empty(linear: nn.Linear, kind: Any, **options: Any) -> nn.Module:
    """Return a linear of another kind with the same bias, and no storage for the weight that it is going to get."""
    made: nn.Module = kind(linear.in_features, linear.out_features, bias=False, device="meta", **options)
    made.bias = linear.bias
    return made.requires_grad_(False).eval()  # in training LLM.int8() leaves activations alone on a CPU
