"""The factors of a block: names, files, constant ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.families.llama import LLAMA_BLOCK as LLAMA
from omniquant_pl.spec import ClippingSpec, TransformSpec, WeightSpec
from omniquant_pl.transform import AttentionShape

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=4)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {f"{norm}.weight": torch.ones(16) for norm in ("input_layernorm", "post_attention_layernorm")}


def make(tensors: dict[str, Tensor], transform: TransformSpec | None = None) -> BlockFactors:
    return BlockFactors(LLAMA, tensors, WeightSpec(3, 8), SHAPE, ClippingSpec(), transform)


def test_names_in_files(tensors: dict[str, Tensor]) -> None:
    names = set(make(tensors, TransformSpec(mlp=True)).export())
    clipping = {f"{linear}.clip.{end}" for linear in LLAMA.linears for end in ("upper", "lower")}
    pairs = (
        "input_layernorm",
        "self_attn.v_proj",
        "self_attn.q_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    )
    assert names == clipping | {f"{pair}.scale" for pair in pairs}


def test_factors_survive_export_and_load(tensors: dict[str, Tensor]) -> None:
    learned, loaded = make(tensors, TransformSpec()), make(tensors, TransformSpec())
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(torch.rand(parameter.shape))
    loaded.load(learned.export(), "a file")
    found, expected = loaded.fold(tensors), learned.fold(tensors)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def test_factors_of_other_settings_are_refused_by_name(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigurationError, match=r"model.parameters: a file .*input_layernorm.scale"):
        make(tensors, TransformSpec()).load(make(tensors).export(), "a file")
    wrong = make(tensors).export()
    wrong["mlp.up_proj.clip.upper"] = torch.zeros(1, 1)
    with pytest.raises(ConfigurationError, match=r"mlp\.up_proj\.clip\.upper"):
        make(tensors).load(wrong, "a file")


def test_constant_ranges_change_nothing_and_are_kept_for_unchanged_weights_only(
    tensors: dict[str, Tensor],
) -> None:
    factors = make(tensors, TransformSpec())
    with torch.no_grad():
        for _, pair in factors.named_pairs():
            pair.scale.mul_(1.7)
    before = factors(tensors)
    factors.freeze_ranges(tensors)
    assert set(factors._constant_ranges) == {"mlp.down_proj"}  # the one linear that no pair of the paper changes
    for name, tensor in factors(tensors).items():
        assert torch.equal(tensor, before[name]), name


def test_folding_keeps_norms_and_biases_and_codes_in_range(tensors: dict[str, Tensor]) -> None:
    factors = make(tensors, TransformSpec())
    folded = factors.fold(tensors)
    assert set(folded.tensors) == set(tensors)
    for name, weight in folded.quantized.items():
        assert int(weight.codes.max()) <= 7, name
        assert weight.scale.shape == (weight.codes.shape[0], -(-weight.codes.shape[1] // 8))


def test_a_scale_that_cannot_be_stored_names_its_linear(tensors: dict[str, Tensor]) -> None:
    tensors["mlp.up_proj.weight"] *= 1e7
    with pytest.raises(CalibrationError, match=r"mlp\.up_proj: .*float16"):
        make(tensors).fold(tensors)
