"""The equivalent transformation changes nothing before quantization, whatever its scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.quant import ChannelRange
from omniquant_pl.spec import TransformSpec, WeightSpec
from omniquant_pl.transform import AttentionShape, NormToLinears, QueryToKey, ValueToOutput
from omniquant_pl.transform.base import initial_scale


def randomize(factors: BlockFactors, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, pair in factors.named_pairs():
            pair.scale.copy_(torch.exp(0.5 * torch.randn(pair.scale.shape, generator=generator)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_random_scales_leave_the_logits_as_they_are(
    make_llama: Callable[..., Path], kv_heads: int, bias: bool, tied: bool
) -> None:
    folder = make_llama(
        num_key_value_heads=kv_heads,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    source = SourceModel(folder)
    tokens = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    calls = source.calls(24)
    hidden = source.embed(tokens)
    for index in range(len(source)):
        tensors = source.block_tensors(index)
        factors = BlockFactors(
            source.layouts[0],
            tensors,
            WeightSpec(),
            source.attention,
            transform=TransformSpec(mlp=True),
        )
        randomize(factors, seed=index)
        transformed = factors.transformed(tensors)
        unchanged = {name for name in tensors if torch.equal(transformed[name], tensors[name])}
        assert unchanged <= {"self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.down_proj.bias"}
        with torch.no_grad():
            hidden = calls[index](source.make_block(index, transformed), hidden)
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    error = (source.logits(hidden) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5


def test_a_scale_of_its_own_per_channel_would_not_commute_with_the_rotary_embedding(
    make_llama: Callable[..., Path],
) -> None:
    """Shows that the equivalence test can fail: an unshared q/k scale, as in the original, is caught."""
    source = SourceModel(make_llama(initializer_range=0.4))
    tensors = source.block_tensors(0)
    scale = torch.exp(0.3 * torch.randn(32, generator=torch.Generator().manual_seed(2)))
    broken = dict(tensors)
    broken["self_attn.q_proj.weight"] = tensors["self_attn.q_proj.weight"] / scale[:, None]
    broken["self_attn.k_proj.weight"] = tensors["self_attn.k_proj.weight"] * scale[:, None]
    hidden = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3))
    call = source.calls(24)[0]
    with torch.no_grad():
        expected, found = (call(source.make_block(0, t), hidden) for t in (tensors, broken))
    assert (found - expected).abs().max() / expected.abs().max() > 1e-3


def test_query_key_scale_is_shared_over_rotary_pairs_and_query_heads() -> None:
    pair = QueryToKey("q", "k").build({}, AttentionShape(heads=4, kv_heads=2, head_dim=4), False)
    with torch.no_grad():
        pair.scale.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    tensors: dict[str, Tensor] = {"q.weight": torch.ones(16, 1), "k.weight": torch.ones(8, 1)}
    pair.apply_to(tensors)
    assert tensors["k.weight"].flatten().tolist() == [1, 2, 1, 2, 4, 8, 4, 8]
    assert (1 / tensors["q.weight"]).flatten().tolist() == [1, 2, 1, 2] * 2 + [4, 8, 4, 8] * 2


def test_value_scale_is_shared_by_the_query_heads_of_a_kv_head() -> None:
    pair = ValueToOutput("v", "o").build({}, AttentionShape(heads=4, kv_heads=2, head_dim=1), False)
    with torch.no_grad():
        pair.scale.copy_(torch.tensor([2.0, 4.0]))
    tensors: dict[str, Tensor] = {
        "v.weight": torch.ones(2, 1),
        "v.bias": torch.ones(2),
        "o.weight": torch.ones(1, 4),
    }
    pair.apply_to(tensors)
    assert tensors["v.weight"].flatten().tolist() == [0.5, 0.25]
    assert tensors["v.bias"].tolist() == [0.5, 0.25]
    assert tensors["o.weight"].flatten().tolist() == [2, 2, 4, 4]


def test_initial_scale_is_smoothquants() -> None:
    found = initial_scale(torch.tensor([16.0, 0.0]), torch.tensor([4.0, 1.0]), alpha=0.75)
    assert found.tolist() == pytest.approx([16**0.75 / 4**0.25, 1e-5**0.75])


def test_initialization_looks_at_every_consumer() -> None:
    layout = NormToLinears("norm", ("a", "b"))
    tensors = {
        "norm.weight": torch.ones(2),
        "a.weight": torch.tensor([[1.0, -4.0]]),
        "b.weight": torch.tensor([[-9.0, 1.0]]),
    }
    pair = layout.build(tensors, AttentionShape(1, 1, 2), False)
    seen = ChannelRange(low=torch.tensor([-4.0, 0.0]), high=torch.tensor([1.0, 1.0]))
    pair.initialize(tensors, {"a": seen, "b": seen}, alpha=0.5)
    assert pair.scale.tolist() == pytest.approx([(4 / 9) ** 0.5, (1 / 4) ** 0.5])


def test_projection_keeps_scales_away_from_zero_and_their_sign() -> None:
    pair = ValueToOutput("v", "o").build({}, AttentionShape(heads=4, kv_heads=4, head_dim=1), False)
    with torch.no_grad():
        pair.scale.copy_(torch.tensor([-1e-3, 0.0, 5e-3, 2.0]))
    pair.project()
    assert pair.scale.tolist() == pytest.approx([-1e-2, 1e-2, 1e-2, 2.0])
