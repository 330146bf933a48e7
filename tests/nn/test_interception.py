"""Attention inputs quantized where a module calls torch's attention itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from omniquant_pl.nn import ATTENTION, AttentionInputs, prepare_block
from omniquant_pl.nn.interception import intercept_attention
from omniquant_pl.quant import dynamic_fake_quantize
from omniquant_pl.spec import ActivationSpec

SPEC = ActivationSpec(3)


class Attention(nn.Module):
    """Attention over `[batch, heads, tokens, channels]` that calls torch's function by keyword or position."""

    def __init__(self, keywords: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16) + 0.1)
        self.keywords = keywords

    def forward(self, hidden: Tensor, *, fail: bool = False) -> Tensor:
        if fail:
            raise ValueError("failed")
        query, key, value = hidden @ self.weight, hidden, hidden.flip(-1)
        if self.keywords:
            return F.scaled_dot_product_attention(value=value, key=key, query=query, is_causal=True)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.other = Attention(), Attention()

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(hidden), self.other(hidden)


class Relu(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.relu()


def expected(hidden: Tensor, weight: Tensor) -> Tensor:
    """Causal attention of quantized inputs, written out."""
    states = (hidden @ weight, hidden, hidden.flip(-1))
    query, key, value = (dynamic_fake_quantize(state, SPEC.bits, SPEC.symmetric) for state in states)
    later = torch.ones(hidden.shape[-2], hidden.shape[-2], dtype=torch.bool).triu(1)
    logits = (query @ key.transpose(-1, -2) / 4).masked_fill(later, -torch.inf)
    return logits.softmax(-1) @ value


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keywords", [False, True])
def test_inputs_are_quantized(hidden: Tensor, keywords: bool) -> None:
    attention = Attention(keywords)
    plain = attention(hidden)
    intercept_attention(attention, AttentionInputs(SPEC))
    assert isinstance(attention, Attention)
    found = attention(hidden)
    assert_close(found, expected(hidden, attention.weight))
    assert not torch.allclose(found, plain, atol=1e-2)


class TestBlock:
    """One of a block's two attention modules is intercepted."""

    @pytest.fixture
    def block(self) -> Block:
        block = Block()
        intercept_attention(block.attention, AttentionInputs(SPEC))
        return block

    def test_no_other_module_is_intercepted(self, block: Block, hidden: Tensor) -> None:
        assert torch.equal(block(hidden)[1], Attention()(hidden))

    def test_nor_one_after_an_error(self, block: Block, hidden: Tensor) -> None:
        with pytest.raises(ValueError, match="failed"):
            block.attention(hidden, fail=True)
        assert torch.equal(block.other(hidden), Attention()(hidden))

    def test_names_of_tensors_stay(self, block: Block) -> None:
        assert list(block.state_dict()) == list(Block().state_dict())

    def test_gradients_pass_through_swapped_tensors(self, block: Block, hidden: Tensor) -> None:
        gradients = []
        for function in (lambda weight: functional_call(block, {"attention.weight": weight}, (hidden,))[0], None):
            weight = (torch.eye(16) - 0.1).requires_grad_()
            output = expected(hidden, weight) if function is None else function(weight)
            output.square().sum().backward()
            gradients.append(weight.grad)
        assert gradients[0].abs().max() > 0.1
        assert_close(*gradients)

    def test_a_copy_is_intercepted_with_its_own_tensors(self, block: Block, hidden: Tensor) -> None:
        twin = copy.deepcopy(block)
        with torch.no_grad():
            twin.attention.weight.mul_(2)
        assert_close(twin(hidden)[0], expected(hidden, 2 * (torch.eye(16) + 0.1)))
        assert_close(block(hidden)[0], expected(hidden, torch.eye(16) + 0.1))


def test_attention_of_another_kind_is_refused(hidden: Tensor) -> None:
    module = Relu()
    intercept_attention(module, AttentionInputs(SPEC))
    with pytest.raises(RuntimeError, match="Relu does not call scaled_dot_product_attention"):
        module(hidden)


@pytest.mark.parametrize(("implementation", "intercepted"), [(ATTENTION, False), ("sdpa", True), (None, True)])
def test_modules_that_ask_for_our_function_are_not_intercepted(implementation: str | None, intercepted: bool) -> None:
    class Config:
        _attn_implementation = implementation

    block: Any = Block()
    if implementation is not None:
        block.attention.config = Config()
    prepare_block(block, (), "attention", SPEC)
    assert (type(block.attention) is not Attention) == intercepted
    assert isinstance(block.attention.attention_inputs, AttentionInputs)
