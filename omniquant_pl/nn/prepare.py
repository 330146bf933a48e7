"""Turns a transformer block into one that can be calibrated: its own code, without parameters of its own."""

from __future__ import annotations

from torch import nn

from omniquant_pl.nn.attention import ATTENTION, AttentionInputs
from omniquant_pl.nn.interception import intercept_attention
from omniquant_pl.nn.linear import QuantLinear
from omniquant_pl.spec import ActivationSpec

__all__ = ["prepare_block", "quantize_attention"]


def _freeze(module: nn.Module) -> None:
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                del child._parameters[name]
                child.register_buffer(name, parameter.detach(), persistent=False)


def _asks_for_our_attention(module: nn.Module) -> bool:
    """Return whether a module asks transformers' interface for our attention function."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == ATTENTION


def prepare_block(
    block: nn.Module, linears: tuple[str, ...], attention: str, activations: ActivationSpec | None
) -> nn.Module:
    """Make a block ready for calibration, in place: linears swapped, every other parameter a frozen buffer.

    Args:
        block: A transformer block with its weights loaded.
        linears: Dotted names of the linears to quantize.
        attention: Dotted name of the attention module.
        activations: Quantization of the linears' inputs and of the attention inputs; ``None`` for neither.

    Returns:
        The same block, which has no parameters now.
    """
    for name in linears:
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a linear")
        block.set_submodule(name, QuantLinear.of(linear, activations))
    _freeze(block)
    if activations is not None:
        quantize_attention(block.get_submodule(attention), activations)
    return block.eval()


def quantize_attention(attention: nn.Module, activations: ActivationSpec) -> None:
    """Make an attention module quantize q, k and v, in place.

    Args:
        attention: The module; its model was built with :data:`ATTENTION`, or it calls torch's attention itself.
        activations: Width and symmetry.
    """
    inputs = AttentionInputs(activations)
    if _asks_for_our_attention(attention):
        attention.add_module("attention_inputs", inputs)
    else:
        intercept_attention(attention, inputs)
