"""A block learns its factors and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from omniquant_pl.block import BlockModule
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange, observe_inputs
from omniquant_pl.quantized_block import QuantizedBlock
from omniquant_pl.spec import ActivationSpec, ClippingSpec, TransformSpec, WeightSpec

TOKENS = 16


@pytest.fixture
def folder(make_llama: Callable[..., Path]) -> Path:
    return make_llama(num_key_value_heads=2)


def make(model: OmniQuantModel) -> tuple[QuantizedBlock, Tensor, Tensor]:
    """Returns the first block, its input and its full-precision output."""
    source = model.source
    call, tensors = source.calls(TOKENS)[0], source.block_tensors(0)
    hidden = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(1))
    original = source.make_block(0, tensors)
    with torch.no_grad(), observe_inputs(original, source.layouts[0].linears) as inputs:
        target = call(original, hidden)
    return model.block(0, tensors, call, inputs), hidden, target


def learner(model: OmniQuantModel, *blocks: QuantizedBlock) -> BlockModule:
    return BlockModule(blocks, model.learning)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_parameters_are_clipping_and_transform_factors_and_nothing_else(folder: Path) -> None:
    block, _, _ = make(OmniQuantModel(str(folder), WeightSpec(4), ActivationSpec(4), transform=TransformSpec()))
    names = {name for name, _ in block.named_parameters()}
    attention, mlp = "factors.quantizers.self_attn/", "factors.quantizers.mlp/"
    clipping = {
        f"{attention if name[0] in 'qkvo' else mlp}{name}.{end}" for name in LINEARS for end in ("upper", "lower")
    }
    pairs = ("input_layernorm", "self_attn/v_proj", "self_attn/q_proj", "post_attention_layernorm")
    assert names == clipping | {f"factors.pairs.{pair}.scale" for pair in pairs}
    assert set(block.state_dict()) == names  # a checkpoint holds no weights


def test_each_kind_of_factor_has_its_own_rate(folder: Path) -> None:
    model = OmniQuantModel(str(folder), clipping=ClippingSpec(lr=0.03), transform=TransformSpec(lr=0.002))
    block, _, _ = make(model)
    optimizer = learner(model, block).configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in block.named_parameters():
        assert rates[id(parameter)] == (0.002 if "pairs" in name else 0.03)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_loss_is_the_mean_squared_error_with_the_augmented_target_added(folder: Path) -> None:
    model = OmniQuantModel(str(folder), WeightSpec(3))
    block, hidden, target = make(model)
    output = block(hidden).detach()
    module = learner(model, block)
    assert module.training_step((hidden, target), 0).item() == pytest.approx(float(F.mse_loss(output, target)))
    other = target + 1
    expected = float(F.mse_loss(output, target) + F.mse_loss(output, other))
    assert module.training_step((hidden, target, other), 0).item() == pytest.approx(expected)


@pytest.mark.parametrize("activations", [None, ActivationSpec(4)])
def test_every_factor_receives_a_gradient(folder: Path, activations: ActivationSpec | None) -> None:
    model = OmniQuantModel(str(folder), WeightSpec(3, 16), activations, transform=TransformSpec(mlp=True))
    block, hidden, target = make(model)
    learner(model, block).training_step((hidden, target), 0).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_without_quantization_the_initial_transform_changes_nothing(folder: Path) -> None:
    block, hidden, target = make(OmniQuantModel(str(folder), WeightSpec(8), transform=TransformSpec(mlp=True)))
    network = block.factors.transformed(block.tensors)
    found = block.call(block.network, hidden)
    transformed = torch.func.functional_call(block.network, network, (hidden,), dict(block.call.options))
    assert torch.allclose(found, target, atol=1e-5)
    assert torch.allclose(transformed, target, atol=1e-5)


def test_folding_gives_what_was_trained_up_to_the_stored_scale(folder: Path) -> None:
    block, hidden, target = make(OmniQuantModel(str(folder), WeightSpec(8), transform=TransformSpec()))
    with torch.no_grad():
        trained = block(hidden)
        folded = block.fold()
        found = block(hidden)
    assert block.is_folded
    assert (found - trained).abs().max() / target.abs().max() < 1e-2
    assert set(folded.quantized) == {name for name, _ in block.factors.named_quantizers()}
    for name, weight in folded.quantized.items():
        assert torch.equal(block.network.get_submodule(name).weight, weight.dequantize())


def test_a_block_is_folded_once(folder: Path) -> None:
    block, _, _ = make(OmniQuantModel(str(folder)))
    block.fold()
    with pytest.raises(RuntimeError, match="block 0 is folded already"):
        block.fold()


def test_attention_inputs_are_quantized_after_the_rotary_embedding(folder: Path) -> None:
    block, hidden, _ = make(OmniQuantModel(str(folder), WeightSpec(8), ActivationSpec(4)))
    seen: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        projection = block.network.get_submodule(f"self_attn.{name}_proj")
        projection.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
    attention = block.network.get_submodule("self_attn.attention_inputs")
    attention.register_forward_hook(lambda _, args, output: seen.update(zip(("qq", "kq", "vq"), output, strict=True)))
    with torch.no_grad():
        block(hidden)
    query, key, value = (seen[name].view(2, TOKENS, -1, 8).transpose(1, 2) for name in ("q", "k", "v"))
    query, key = apply_rotary_pos_emb(query, key, *block.call.options["position_embeddings"])
    for name, state in (("qq", query), ("kq", key), ("vq", value)):
        assert seen[name].shape == state.shape
        assert torch.allclose(seen[name], per_token_and_head(state, bits=4), atol=1e-5), name


def per_token_and_head(state: Tensor, bits: int) -> Tensor:
    """The formula, one token of one head at a time."""
    rows = []
    for row in state.reshape(-1, state.shape[-1]):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        rows.append(((row / step).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(step))
    return torch.stack(rows).view(state.shape)


def test_observed_ranges_are_those_of_the_linear_inputs() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(3, 2))
    first, second = torch.randn(5, 3), torch.randn(2, 4, 3)
    with observe_inputs(linear, ["0"]) as ranges:
        linear(first)
        linear(second)
    everything = torch.cat((first, second.reshape(-1, 3)))
    assert torch.equal(ranges["0"].low, everything.amin(0))
    assert torch.equal(ranges["0"].high, everything.amax(0))
    assert torch.equal(ChannelRange.of(everything).magnitude, everything.abs().amax(0))
