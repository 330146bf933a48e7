"""Linears and blocks made ready for calibration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omniquant_pl.nn import QuantLinear, prepare_block
from omniquant_pl.spec import ActivationSpec


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.up = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(8)


def test_input_is_quantized_per_token() -> None:
    linear = nn.Linear(8, 5)
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = []
    for token in hidden.reshape(-1, 8):
        low, high = min(float(token.min()), 0.0), max(float(token.max()), 0.0)
        step = (high - low) / 15
        zero = round(-low / step)
        codes = ((token / step).round() + zero).clamp(0, 15)
        expected.append(((codes - zero) * step) @ linear.weight.T + linear.bias)
    found = QuantLinear.of(linear, ActivationSpec(4))(hidden)
    assert torch.allclose(found, torch.stack(expected).view(2, 3, 5), atol=1e-5)


def test_without_activation_quantization_it_is_the_linear() -> None:
    linear = nn.Linear(8, 5, bias=False)
    hidden = torch.randn(4, 8)
    assert torch.equal(QuantLinear.of(linear, None)(hidden), linear(hidden))


@pytest.mark.parametrize("activations", [None, ActivationSpec(6)])
def test_a_prepared_block_has_buffers_in_place_of_parameters(activations: ActivationSpec | None) -> None:
    block = Block()
    names = {name for name, _ in block.named_parameters()}
    weight = block.up.weight
    prepare_block(block, ("up",), "attention", activations)
    assert not list(block.parameters())
    assert {name for name, _ in block.named_buffers()} == names
    assert not block.state_dict()
    assert block.get_submodule("up").weight.data_ptr() == weight.data_ptr()
    assert not block.training
    assert hasattr(block.attention, "attention_inputs") == (activations is not None)


def test_what_is_not_a_linear_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="norm is a LayerNorm"):
        prepare_block(Block(), ("norm",), "attention", None)
