"""A block learns its factors and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F
from torch.optim import SGD
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from omniquant_pl.blocks.compiled import check_compiler, differing_kinds
from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange, observe_inputs
from omniquant_pl.spec import (
    ActivationSpec,
    ClippingSpec,
    LearningSpec,
    ObjectiveSpec,
    RoundingSpec,
    ScheduleSpec,
    TransformSpec,
    WeightSpec,
)
from omniquant_pl.trainer import SequentialTrainer

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
    return BlockModule(blocks, model.rates)


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


def test_no_gradient_is_left_when_learning_ends(folder: Path) -> None:
    model = OmniQuantModel(str(folder), transform=TransformSpec(), rounding=RoundingSpec("learned"))
    block, hidden, target = make(model)
    module = learner(model, block)
    module.on_fit_start()
    module.training_step((hidden, target), 0).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    module.on_fit_end()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_each_kind_of_factor_has_its_own_rate(folder: Path) -> None:
    model = OmniQuantModel(str(folder), clipping=ClippingSpec(lr=0.03), transform=TransformSpec(lr=0.002))
    block, _, _ = make(model)
    optimizer = learner(model, block).configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in block.named_parameters():
        assert rates[id(parameter)] == (0.002 if "pairs" in name else 0.03)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_offsets_have_a_rate_of_their_own(folder: Path) -> None:
    model = OmniQuantModel(str(folder), transform=TransformSpec(), rounding=RoundingSpec("learned", 0.07))
    block, hidden, target = make(model)
    module = learner(model, block)
    optimizer = module.configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"offset": 0.07, "scale": 5e-3, "upper": 1e-2, "lower": 1e-2}
    assert len(rates) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == expected[name.rpartition(".")[2]], name
    module.training_step((hidden, target), 0).backward()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
            parameter += 3.0 if name.endswith("offset") else 0.0
    module.optimizer_step(0, 0, SGD([{"params": list(module.parameters()), "lr": 0.0}]), lambda: None)
    offsets = [p for name, p in module.named_parameters() if name.endswith("offset")]
    assert [tuple(offset.shape) for offset in offsets] == [
        tuple(block.tensors[f"{name}.weight"].shape) for name, _ in block.factors.named_quantizers()
    ]
    assert all(bool((offset == 0.5).all()) for offset in offsets)


def test_weight_decay_reaches_every_factor(folder: Path) -> None:
    """A step without a gradient multiplies factors by ``1 - lr * decay`` (decoupled, arXiv 1711.05101)."""
    model = OmniQuantModel(
        str(folder),
        transform=TransformSpec(lr=4e-3),
        rounding=RoundingSpec("learned"),
        learning=LearningSpec(weight_decay=0.5),
    )
    block, _, _ = make(model)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.rand(parameter.shape))
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    learner(model, block).configure_optimizers().step()
    for name, parameter in block.named_parameters():
        rate = 4e-3 if name.endswith("scale") else 1e-2
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * rate))


class Rates(Callback):
    """The learning rates of every step, by fit and kind of factors."""

    def __init__(self) -> None:
        self.fits: list[dict[str, list[float]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.fits.append({})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            self.fits[-1].setdefault(group["name"], []).append(group["lr"])


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 3}],
    ids=lambda options: next(iter(options), ""),
)
def test_rates_follow_the_schedule_over_the_steps_of_every_block(
    folder: Path, fit: Callable[..., SequentialTrainer], options: dict[str, int]
) -> None:
    """Four epochs of six samples; fewer steps where gradients are accumulated or an epoch is cut short."""
    rates = Rates()
    model = OmniQuantModel(
        str(folder), transform=TransformSpec(lr=4e-3), learning=LearningSpec(ScheduleSpec(0.25, "cosine"))
    )
    fit(model, [rates], max_epochs=4, **options)
    steps = 4 * (3 if options else 6)
    rising = steps // 4
    up = [(step + 1) / (rising + 1) for step in range(rising)]
    down = [0.5 + 0.5 * math.cos(math.pi * step / (steps - rising)) for step in range(steps - rising)]
    assert len(rates.fits) == 2
    for found in rates.fits:
        assert found["clipping"] == pytest.approx([1e-2 * factor for factor in up + down])
        assert found["transform"] == pytest.approx([4e-3 * factor for factor in up + down])


def test_without_a_schedule_rates_stay(folder: Path, fit: Callable[..., SequentialTrainer]) -> None:
    rates = Rates()
    fit(OmniQuantModel(str(folder)), [rates], {"samples": 2}, max_epochs=2)
    assert rates.fits == [{"clipping": [1e-2] * 4}] * 2


def test_loss_is_the_mean_squared_error_with_the_augmented_target_added(folder: Path) -> None:
    model = OmniQuantModel(str(folder), WeightSpec(3))
    block, hidden, target = make(model)
    output = block(hidden).detach()
    module = learner(model, block)
    assert module.training_step((hidden, target), 0).item() == pytest.approx(float(F.mse_loss(output, target)))
    other = target + 1
    expected = float(F.mse_loss(output, target) + F.mse_loss(output, other))
    assert module.training_step((hidden, target, other), 0).item() == pytest.approx(expected)


def test_the_loss_of_predictions_is_their_divergence(folder: Path) -> None:
    """torch's own, of the logits that transformers' norm and head make: mean over all tokens of a batch."""
    model = OmniQuantModel(str(folder), WeightSpec(3), objective=ObjectiveSpec(output_loss="kl"))
    block, hidden, target = make(model)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def predictions(states: Tensor) -> Categorical:
        return Categorical(logits=reference.lm_head(reference.model.norm(states)))

    module = BlockModule([block], model.rates, model.source.logits)
    with torch.no_grad():
        output, other = block(hidden), target.flip(1)
        one, two = (kl_divergence(predictions(t), predictions(output)) for t in (target, other))
        assert one.shape == (2, TOKENS)
        assert float(module.loss((hidden, target))) == pytest.approx(float(one.mean()), rel=1e-4)
        assert float(module.loss((hidden, target, other))) == pytest.approx(float((one + two).mean()), rel=1e-4)
        assert float(module.loss((hidden, output))) == pytest.approx(0, abs=1e-6)
    module.loss((hidden, target)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in block.parameters())
    assert all(not p.requires_grad for p in model.source._model.parameters())


def test_widths_by_linear_are_those_of_the_codes(folder: Path) -> None:
    model = OmniQuantModel(str(folder), WeightSpec(2, bits_of={"down_proj": 5, "v_proj": 3}))
    block, _, _ = make(model)
    with torch.no_grad():
        trained = block.factors(block.tensors)
    quantized = block.fold().quantized
    for name, weight in quantized.items():
        bits = {"mlp.down_proj": 5, "self_attn.v_proj": 3}.get(name, 2)
        assert (int(weight.codes.min()), int(weight.codes.max())) == (0, 2**bits - 1), name
        assert 2 ** (bits - 1) < max(len(row.unique()) for row in trained[f"{name}.weight"]) <= 2**bits, name


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


class TestCompiledSteps:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_have_the_gradients_of_plain_ones(self, folder: Path, autocast: bool) -> None:
        found: dict[bool, dict[str, Any]] = {}
        for compiles in (False, True):
            options: dict[str, Any] = {
                "activations": ActivationSpec(8),
                "transform": TransformSpec(),
                "learning": LearningSpec(compile=compiles),
            }
            model = OmniQuantModel(str(folder), WeightSpec(4, 8), **options)
            block, hidden, target = make(model)
            module = learner(model, block)
            block.start_learning()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = module.loss((hidden, target))
            loss.backward()
            found[compiles] = {name: each.grad for name, each in module.named_parameters()}
        kinds = [name.rpartition(".")[2] for name in found[False]]
        assert not differing_kinds(list(found[False].values()), list(found[True].values()), kinds)
        if autocast:  # compiled code rounds less often to half precision
            return
        norms = [(plain.norm(), (found[True][name] - plain).norm()) for name, plain in found[False].items()]
        # A value at the border between two codes may fall to the other side.
        assert all(distance <= 2e-2 * norm for norm, distance in norms)

    @pytest.mark.parametrize("factor", [1.0, 2.0, math.nan, None])
    def test_that_are_wrong_are_found(
        self, folder: Path, factor: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(block: QuantizedBlock, hidden: Tensor) -> Tensor:
                if factor is None:
                    raise TorchDynamoException("no compiler")
                output = forward(block, hidden)
                return output + (factor - 1) * (output - output.detach())  # other gradients

            return run

        monkeypatch.setattr("omniquant_pl.blocks.module.compiled", broken)
        model = OmniQuantModel(
            str(folder),
            WeightSpec(4),
            ActivationSpec(8),
            transform=TransformSpec(),
            learning=LearningSpec(compile=True),
        )
        block, hidden, target = make(model)
        module = learner(model, block)
        block.start_learning()
        found = module.training_step((hidden, target), 0)
        assert found is not None
        found.backward()
        gradients = {name: each.grad for name, each in module.named_parameters()}
        plain = learner(OmniQuantModel(str(folder), WeightSpec(4), ActivationSpec(8), transform=TransformSpec()), block)
        plain.zero_grad()
        plain.loss((hidden, target)).backward()
        torch.testing.assert_close({name: each.grad for name, each in plain.named_parameters()}, gradients)
        assert [record.levelname for record in caplog.records] == ([] if factor == 1.0 else ["WARNING"])
        checkpoint: dict[str, Any] = {"epoch": {"losses": [], "loss_sum": torch.zeros(()), "loss_count": 0}}
        checkpoint["compiled"] = factor == 1.0
        resumed = learner(model, block)
        resumed.on_load_checkpoint(checkpoint)
        assert resumed._is_compiled is module._is_compiled is (factor == 1.0)

    def test_are_compiled_once_for_blocks_that_are_alike(self, folder: Path) -> None:
        torch.compiler.reset()
        model = OmniQuantModel(str(folder), WeightSpec(4), learning=LearningSpec(compile=True))
        counters = torch._dynamo.utils.counters["stats"]
        counters.clear()
        for _ in range(2):
            block, hidden, target = make(model)
            learner(model, block).loss((hidden, target)).backward()
        assert counters["unique_graphs"] == 1

    def test_need_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_compiler(torch.device("cpu"))
        monkeypatch.setenv("CXX", "nothing-that-exists")
        with pytest.raises(
            ConfigurationError, match=r"^model\.learning\.compile: .*CXX=nothing-that-exists is not found"
        ):
            check_compiler(torch.device("cpu"))
