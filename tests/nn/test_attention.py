"""The attention function: capped logits, masks, grouped heads, quantized inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omniquant_pl.nn import AttentionInputs
from omniquant_pl.nn.attention import attention_forward
from omniquant_pl.quant import dynamic_fake_quantize
from omniquant_pl.spec import ActivationSpec

BATCH, HEADS, KV_HEADS, TOKENS, CHANNELS = 2, 4, 2, 6, 8
CAPS = [None, 0.5]
WINDOW = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-2)[None, None]
MASKS = {
    "causal": None,
    "boolean": WINDOW,
    "added": torch.where(WINDOW, 0.3, -math.inf),
}


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose logits a cap of 0.5 flattens."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, TOKENS, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def attention_module(causal: bool = True) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    module.is_causal = causal
    return module.eval()


def reference(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, softcap: float | None, scaling: float
) -> np.ndarray:
    """One query after the other in float64, `[batch, queries, heads, head_dim]`."""
    q, k, v = (tensor.double().numpy() for tensor in (query, key, value))
    result = np.zeros((BATCH, q.shape[2], HEADS, CHANNELS))
    for batch, head, token in np.ndindex(BATCH, HEADS, q.shape[2]):
        seen = allowed[token].numpy()
        keys, values = (tensor[batch, head // (HEADS // KV_HEADS), seen] for tensor in (k, v))
        logits = [scaling * float(q[batch, head, token] @ one) for one in keys]
        if softcap is not None:
            logits = [softcap * math.tanh(logit / softcap) for logit in logits]
        weights = np.exp(logits)
        result[batch, token, head] = weights @ values / weights.sum()
    return result


def assert_equal(output: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(output.double(), torch.from_numpy(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(states: tuple[Tensor, ...], mask: str, softcap: float | None) -> None:
    output, weights = attention_forward(attention_module(), *states, MASKS[mask], scaling=0.7, softcap=softcap)
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if mask == "causal" else WINDOW[0, 0]
    assert weights is None
    assert_equal(output, reference(*states, allowed, softcap, scaling=0.7))


def test_the_cap_matters(states: tuple[Tensor, ...]) -> None:
    capped, plain = (attention_forward(attention_module(), *states, None, softcap=cap)[0] for cap in (0.5, None))
    assert (capped - plain).abs().max() > 0.1


@pytest.mark.parametrize("softcap", CAPS)
def test_default_scaling(states: tuple[Tensor, ...], softcap: float | None) -> None:
    output, _ = attention_forward(attention_module(), *states, None, softcap=softcap)
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert_equal(output, reference(*states, allowed, softcap, CHANNELS**-0.5))


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("option", [None, False])
def test_without_causality(states: tuple[Tensor, ...], softcap: float | None, option: bool | None) -> None:
    """The module says so, or the call, which wins."""
    module = attention_module(causal=option is False)
    output, _ = attention_forward(module, *states, None, scaling=1.0, softcap=softcap, is_causal=option)
    assert_equal(output, reference(*states, torch.ones(TOKENS, TOKENS, dtype=torch.bool), softcap, 1.0))


@pytest.mark.parametrize("softcap", CAPS)
def test_a_single_query_sees_every_key(states: tuple[Tensor, ...], softcap: float | None) -> None:
    query, key, value = states
    output, _ = attention_forward(attention_module(), query[:, :, -1:], key, value, None, scaling=1.0, softcap=softcap)
    assert_equal(output, reference(query[:, :, -1:], key, value, torch.ones(1, TOKENS, dtype=torch.bool), softcap, 1.0))


@pytest.mark.parametrize("softcap", CAPS)
def test_inputs_are_quantized(states: tuple[Tensor, ...], softcap: float | None) -> None:
    module = attention_module()
    module.attention_inputs = AttentionInputs(ActivationSpec(3))
    output, _ = attention_forward(module, *states, None, scaling=1.0, softcap=softcap)
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    quantized = [dynamic_fake_quantize(tensor, 3, False) for tensor in states]
    assert_equal(output, reference(*quantized, allowed, softcap, 1.0))
    assert not np.allclose(output, reference(*states, allowed, softcap, 1.0), rtol=0, atol=1e-2)


@pytest.mark.parametrize("softcap", CAPS)
def test_dropout(states: tuple[Tensor, ...], softcap: float | None) -> None:
    output, _ = attention_forward(attention_module(), *states, WINDOW, dropout=1.0, softcap=softcap)
    assert not output.any()
