"""Perplexities against transformers' logits, with quantization written out anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from omniquant_pl.checkpoint import BlockCall, SourceModel
from omniquant_pl.evaluate import original_blocks, perplexity
from omniquant_pl.hidden_states import MemoryBudget, Storage
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, BudgetSpec, WeightSpec

CPU = MemoryBudget(torch.device("cpu"), Path("streams"))
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def perplexity_of(logits: Tensor, tokens: Tensor) -> float:
    """exp of the mean negative log-likelihood in float64, token by token."""
    losses = []
    for window, states in zip(tokens.tolist(), logits.double().numpy(), strict=True):
        for position, token in enumerate(window[1:]):
            row = states[position]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
    return math.exp(np.mean(losses))


def round_group(group: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Round-to-nearest of the weights that share one scale, stored as float16."""
    low, high = np.float32(min(group.min(), 0)), np.float32(max(group.max(), 0))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.float32(np.float16(max(-low, high) / np.float32(top)))
        return np.clip(np.rint(group / scale), -top - 1, top) * scale
    top = 2**bits - 1
    scale = np.float32(np.float16((high - low) / np.float32(top)))
    zero = np.clip(np.rint(-low / scale), 0, top)
    return (np.clip(np.rint(group / scale) + zero, 0, top) - zero) * scale


def round_weights(model: nn.Module, spec: WeightSpec) -> None:
    for name, linear in model.named_modules():
        if name.endswith(LINEARS):
            rows = linear.weight.detach().numpy()
            size = spec.group_size or rows.shape[1]
            for row in rows:
                for start in range(0, len(row), size):
                    group = row[start : start + size]
                    group[:] = round_group(group, spec.bits, spec.symmetric)


def round_tokens(values: Tensor, spec: ActivationSpec) -> Tensor:
    """Rounds every slice over the last dimension with its own range, in float64."""
    exact = values.double()
    low, high = exact.amin(-1, keepdim=True).clamp(max=0), exact.amax(-1, keepdim=True).clamp(min=0)
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        scale = torch.maximum(-low, high) / top
        return ((exact / scale).round().clamp(-top - 1, top) * scale).to(values.dtype)
    top = 2**spec.bits - 1
    scale = (high - low) / top
    zero = (-low / scale).round()
    return (((exact / scale).round() + zero).clamp(0, top).sub(zero) * scale).to(values.dtype)


def round_activations(model: nn.Module, spec: ActivationSpec) -> None:
    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Any:
        return eager_attention_forward(module, *(round_tokens(state, spec) for state in (q, k, v)), *args, **kw)

    AttentionInterface.register("test_rounded", attention)
    AttentionMaskInterface.register("test_rounded", eager_mask)
    model.set_attn_implementation("test_rounded")
    for name, linear in model.named_modules():
        if name.endswith(LINEARS):
            linear.register_forward_pre_hook(lambda _, inputs: (round_tokens(inputs[0], spec), *inputs[1:]))


class TestFullPrecision:
    @pytest.mark.parametrize("tied", [False, True])
    def test_is_that_of_transformers(
        self,
        make_llama: Callable[..., Path],
        logits_of: Callable[..., Tensor],
        tokens: Tensor,
        tied: bool,
    ) -> None:
        folder = make_llama(num_key_value_heads=2, tie_word_embeddings=tied)
        source = SourceModel(folder)
        measured = perplexity(source, original_blocks(source), tokens, CPU)
        assert measured == pytest.approx(perplexity_of(logits_of(folder, tokens), tokens), rel=1e-6)

    def test_windows_do_not_see_each_other(self, llama: Path, tokens: Tensor) -> None:
        source = SourceModel(llama)
        each = [perplexity(source, original_blocks(source), w[None], CPU) for w in tokens]
        together = perplexity(source, original_blocks(source), tokens, CPU)
        assert together == pytest.approx(math.exp(np.mean(np.log(each))), rel=1e-6)

    def test_uniform_model(self, make_llama: Callable[..., Path], tokens: Tensor) -> None:
        """Equal logits give the size of the vocabulary, whatever the tokens are."""
        source = SourceModel(make_llama())
        source.logits = lambda hidden: torch.zeros(*hidden.shape[:2], 64)  # type: ignore[method-assign]
        measured = perplexity(source, original_blocks(source), tokens, CPU)
        assert measured == pytest.approx(64, rel=1e-6)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_does_not_depend_on_where_hidden_states_are(
        self, llama: Path, tokens: Tensor, tmp_path: Path, autocast: bool
    ) -> None:
        def found(budget: BudgetSpec) -> float:
            context = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
            source, room = SourceModel(llama), MemoryBudget(CPU.device, tmp_path / "streams", budget)
            return perplexity(source, original_blocks(source), tokens, room, context)

        in_memory = found(BudgetSpec())
        assert not (tmp_path / "streams").exists()
        assert found(BudgetSpec(host=0)) == in_memory
        assert list((tmp_path / "streams").iterdir()) == []

    def test_two_streams_are_there_at_most(
        self, llama: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The budget is that of both; files show how many there are while a block runs and while logits are made."""
        source, room = SourceModel(llama), MemoryBudget(CPU.device, tmp_path, BudgetSpec(host=0))
        files = Storage("disk", torch.float32, CPU.device, tmp_path)  # they have names here, to be counted by
        monkeypatch.setattr(MemoryBudget, "storage", lambda *_: files)
        sizes: list[int] = []
        compute = SourceModel.logits
        look = lambda: sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))  # noqa: E731
        monkeypatch.setattr(SourceModel, "logits", lambda *arguments: look() or compute(*arguments))
        stream = tokens.numel() * source.config.hidden_size * 4

        def build(index: int, tensors: dict[str, Tensor], call: BlockCall) -> nn.Module:
            block = original_blocks(source)(index, tensors, call)
            block.register_forward_hook(lambda *_: look())
            return block

        perplexity(source, build, tokens, room)
        assert max(sizes) <= 2 * stream
        assert sizes[-1] == stream

    def test_batches_that_do_not_fit_are_halved(self, llama: Path, tokens: Tensor) -> None:
        source = SourceModel(llama)
        sizes: list[int] = []

        def build(index: int, tensors: dict[str, Tensor], call: BlockCall) -> nn.Module:
            block = original_blocks(source)(index, tensors, call)
            block.register_forward_pre_hook(lambda _, inputs: refuse(len(inputs[0])))
            return block

        def refuse(samples: int) -> None:
            sizes.append(samples)
            if samples > 1:
                raise torch.OutOfMemoryError("it is full")

        found = perplexity(source, build, tokens, CPU)
        assert found == pytest.approx(perplexity(source, original_blocks(source), tokens, CPU), rel=1e-6)
        assert max(sizes) == len(tokens)


class TestRoundToNearest:
    @pytest.mark.parametrize(
        "spec",
        [
            WeightSpec(bits=2),
            WeightSpec(bits=3, group_size=16),
            WeightSpec(bits=4, group_size=20),  # divides neither 32 nor 48
            WeightSpec(bits=4, symmetric=True),
            WeightSpec(bits=8, group_size=64),  # more than there are
        ],
        ids=["w2", "w3g16", "w4g20", "w4sym", "w8g64"],
    )
    def test_weights(self, make_llama: Callable[..., Path], tokens: Tensor, spec: WeightSpec) -> None:
        folder = make_llama(num_key_value_heads=2, attention_bias=True)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            full = perplexity_of(reference(tokens).logits, tokens)
            round_weights(reference, spec)
            expected = perplexity_of(reference(tokens).logits, tokens)
        model = OmniQuantModel(path=str(folder), weights=spec)
        measured = perplexity(model.source, model.round_to_nearest, tokens, CPU)
        assert measured == pytest.approx(expected, rel=1e-5)
        assert abs(expected - full) > 1e-4 * full

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_activations(self, make_llama: Callable[..., Path], tokens: Tensor, bits: int, symmetric: bool) -> None:
        """Block by block: a value halfway between two codes may go either way, and moves all after it."""
        folder = make_llama(num_key_value_heads=2, num_hidden_layers=3)
        weights, activations = WeightSpec(bits=8), ActivationSpec(bits, symmetric)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = OmniQuantModel(path=str(folder), weights=weights, activations=activations)
        with torch.no_grad():
            round_weights(reference, weights)
            unrounded = reference(tokens, output_hidden_states=True).hidden_states
            round_activations(reference, activations)
            states = reference(tokens, output_hidden_states=True).hidden_states
            for index, call in enumerate(model.source.calls(tokens.shape[1])[:2]):
                block = model.round_to_nearest(index, model.source.block_tensors(index), call)
                error = (block(states[index]) - states[index + 1]).abs().amax(-1)
                rounding = (unrounded[index + 1] - states[index + 1]).abs().amax(-1)
                assert error.median() < 1e-5
                assert rounding.median() > 1e-2

    def test_does_not_depend_on_what_is_learned(self, llama: Path, tokens: Tensor) -> None:
        with_clipping = OmniQuantModel(path=str(llama), weights=WeightSpec(bits=3))
        without = OmniQuantModel(path=str(llama), weights=WeightSpec(bits=3), clipping=None)
        first, second = (
            perplexity(model.source, model.round_to_nearest, tokens, CPU) for model in (with_clipping, without)
        )
        assert first == second


def test_a_token_far_below_the_best_is_finite(make_llama: Callable[..., Path], tokens: Tensor) -> None:
    """A softmax in float32 is zero 104 below the largest logit; the logarithm must not go through it."""
    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 60
    save_file(tensors, folder / "model.safetensors")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.double()[:, :-1]
    expected = float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp())
    gap = logits.amax(-1) - logits.gather(-1, tokens[:, 1:, None])[..., 0]
    assert float(gap.max()) > 104
    source = SourceModel(folder)
    found = perplexity(source, original_blocks(source), tokens, CPU)
    assert found == pytest.approx(expected, rel=1e-4)
