"""Codes that are not the nearest ones: learned and error-compensated rounding, from learning to the exported folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kept_blocks import KeepBlocks
from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.export import HfExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange
from omniquant_pl.quant.gptq import gptq_codes
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import (
    ActivationSpec,
    ClippingSpec,
    ObjectiveSpec,
    RoundingSpec,
    TransformSpec,
    WeightSpec,
    WindowSpec,
)
from omniquant_pl.trainer import SequentialTrainer

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
CODES = {f"{name}.codes" for name in LINEARS}


@dataclass
class Finished:
    """A finished run."""

    model: OmniQuantModel
    folder: RunFolder
    keep: KeepBlocks

    def folded(self, index: int, factors: dict[str, Tensor]) -> QuantizedBlock:
        """The block that these factors give, its input of 16 tokens."""
        source = self.model.source
        return self.model.folded(index, source.block_tensors(index), source.calls(16)[index], factors)


def correlated_model(make_llama: Callable[..., Path], blocks: int) -> Path:
    """A model whose hidden states hardly leave six directions: roundings have much to make up for."""
    folder = make_llama(num_hidden_layers=blocks, num_key_value_heads=2, initializer_range=0.1)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(64, 6, generator=generator) @ torch.randn(6, 32, generator=generator)
    tensors["model.embed_tokens.weight"] = spread + 0.1 * torch.randn(64, 32, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def correlated(make_llama: Callable[..., Path]) -> Path:
    return correlated_model(make_llama, 2)


@pytest.fixture(scope="module")
def shallow(make_llama: Callable[..., Path]) -> Path:
    return correlated_model(make_llama, 1)


@pytest.fixture
def run(fit: Callable[..., SequentialTrainer], tmp_path: Path) -> Callable[..., Finished]:
    def run(
        folder: Path, rounding: Any, weights: WeightSpec, epochs: int = 2, lr: float = 1e-2, **settings: Any
    ) -> Finished:
        model = OmniQuantModel(str(folder), weights, rounding=RoundingSpec(rounding, lr), **settings)
        keep = KeepBlocks()
        root = tmp_path / rounding
        trainer = fit(model, [keep], {"batch_size": 3}, max_epochs=epochs, default_root_dir=root)
        return Finished(model, trainer.run_folder, keep)

    return run


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full-range": {"clipping": None},
    "transform": {"transform": TransformSpec(mlp=True), "objective": ObjectiveSpec(window=WindowSpec(2, 1))},
}


@pytest.mark.parametrize("rounding", ["learned", "gptq"])
@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        (WeightSpec(3, 16), "plain"),
        (WeightSpec(2, 20, symmetric=True), "full-range"),
        (WeightSpec(4, bits_of={"down_proj": 3}), "transform"),
    ],
    ids=["w3g16", "w2g20sym", "w4-mixed"],
)
def test_file_and_exported_folder_hold_the_codes_that_were_chosen(
    run: Callable[..., Finished],
    correlated: Path,
    logits_of: Callable[..., Tensor],
    tokens: Tensor,
    tmp_path: Path,
    rounding: str,
    weights: WeightSpec,
    settings: str,
) -> None:
    finished = run(correlated, rounding, weights, lr=0.05, **SETTINGS[settings])
    for index, block in enumerate(finished.keep.blocks):
        assert_stored(finished, index, block)
        steps = steps_from_nearest(finished, index, block)
        assert all(0 < int((found > 0).sum()) < found.numel() for found in steps.values())
        if rounding == "learned":
            assert max(int(found.max()) for found in steps.values()) == 1  # offsets are within half a code
    HfExport().write(finished.model, finished.folder, tmp_path / "out")
    loaded, calibrated = logits_of(tmp_path / "out", tokens), finished.keep.logits(finished.model, tokens)
    assert (loaded - calibrated).norm() < 1e-5 * calibrated.norm()
    assert (logits_of(correlated, tokens) - calibrated).norm() > 1e-2 * calibrated.norm()


def assert_stored(finished: Finished, index: int, block: QuantizedBlock) -> None:
    """The file holds the codes, and they give the block bit for bit."""
    stored = load_file(finished.folder.factor_file(index))
    assert set(stored) >= CODES
    assert not any("offset" in name for name in stored)
    again = finished.folded(index, finished.folder.load_factors(index))
    torch.testing.assert_close(again.tensors, block.tensors, rtol=0, atol=0)
    weights = finished.model.scheme.weights
    for name in LINEARS:
        codes, bits = stored[f"{name}.codes"], weights.bits_of.get(name.rpartition(".")[2], weights.bits)
        assert codes.dtype == (torch.int8 if weights.symmetric else torch.uint8)
        assert torch.equal(codes, again.quantized[name].codes)
        assert torch.equal(codes, block.quantized[name].codes)
        lowest = -(2 ** (bits - 1)) if weights.symmetric else 0
        assert lowest <= int(codes.min()) < int(codes.max()) <= lowest + 2**bits - 1


def steps_from_nearest(finished: Finished, index: int, block: QuantizedBlock) -> dict[str, Tensor]:
    """By how many codes each weight differs from the nearest on the same grid."""
    factors = finished.folder.load_factors(index)
    nearest = finished.folded(index, {n: factor for n, factor in factors.items() if not n.endswith(".codes")})
    assert all(torch.equal(block.quantized[name].scale, nearest.quantized[name].scale) for name in LINEARS)
    codes = {name: (block.quantized[name].codes, nearest.quantized[name].codes) for name in LINEARS}
    return {name: (mine.int() - other.int()).abs() for name, (mine, other) in codes.items()}


def test_nearest_codes_are_not_stored(run: Callable[..., Finished], shallow: Path) -> None:
    finished = run(shallow, "nearest", WeightSpec(3, 16), epochs=0)
    assert not any(name.endswith(".codes") for name in finished.folder.load_factors(0))


def test_learned_rounding_without_epochs_is_round_to_nearest(run: Callable[..., Finished], shallow: Path) -> None:
    learned, nearest = (
        run(shallow, rounding, WeightSpec(3, 16), epochs=0, clipping=None) for rounding in ("learned", "nearest")
    )
    for mine, other in zip(learned.keep.blocks, nearest.keep.blocks, strict=True):
        torch.testing.assert_close(mine.tensors, other.tensors, rtol=0, atol=0)


def test_learned_rounding_lowers_the_error_further(run: Callable[..., Finished], shallow: Path) -> None:
    learned, nearest = (
        run(shallow, rounding, WeightSpec(2, 16), epochs=6, lr=0.03) for rounding in ("learned", "nearest")
    )
    assert learned.keep.results[0].relative_error < 0.7 * nearest.keep.results[0].relative_error


@pytest.mark.parametrize(
    ("activations", "transform"),
    [
        (None, None),
        (ActivationSpec(8), TransformSpec()),
        (ActivationSpec(4), TransformSpec()),
        (ActivationSpec(4), None),
    ],
    ids=["a16", "a8-let", "a4-let", "a4"],
)
def test_compensation_lowers_the_error_on_correlated_inputs(
    run: Callable[..., Finished],
    shallow: Path,
    activations: ActivationSpec | None,
    transform: TransformSpec | None,
) -> None:
    compensated, nearest = (
        run(shallow, rounding, WeightSpec(4), 0, activations=activations, transform=transform)
        for rounding in ("gptq", "nearest")
    )
    found, expected = compensated.keep.results[0], nearest.keep.results[0]
    assert found.relative_error_rtn == expected.relative_error_rtn
    share = 0.8 if activations is not None and activations.bits == 4 else 0.3  # the rest is the activations' error
    assert found.relative_error < share * expected.relative_error


def per_token(values: np.ndarray, bits: int) -> np.ndarray:
    """Every token quantized with its own range, in float64."""
    low, high = np.minimum(values.min(1, keepdims=True), 0), np.maximum(values.max(1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return (np.clip(np.round(values / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("activations", [None, ActivationSpec(4)], ids=["a16", "a4"])
def test_compensation_knows_what_every_linear_multiplies_with(
    shallow: Path, activations: ActivationSpec | None
) -> None:
    """Transformed weights, and the inputs in the quantized block: in front of each linear, and quantized as there."""
    model = OmniQuantModel(
        str(shallow),
        WeightSpec(3, 16),
        activations,
        ClippingSpec(initial=1.5),
        TransformSpec(),
        rounding=RoundingSpec("gptq"),
    )
    source = model.source
    tensors, call = source.block_tensors(0), source.calls(16)[0]
    hidden = source.embed(torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(5)))
    sizes = {name: tensors[f"{name}.weight"].shape[1] for name in LINEARS}
    scales = torch.rand(48, generator=torch.Generator().manual_seed(6)) + 0.5
    block = model.block(0, tensors, call, {n: ChannelRange(-scales[:s], scales[:s]) for n, s in sizes.items()})
    inputs: dict[str, np.ndarray] = {}
    handles = [
        block.network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1).double().numpy()})
        )
        for name in LINEARS
    ]
    with torch.no_grad():
        block(hidden)
    for handle in handles:
        handle.remove()
    quantize_input = partial(per_token, bits=4) if activations is not None else np.asarray
    weights, expected = block.factors.transformed(block.tensors), {}
    for name, quantizer in block.factors.named_quantizers():
        rows = torch.from_numpy(quantize_input(inputs[name])).float()
        weight = weights[f"{name}.weight"].detach()
        expected[name] = gptq_codes(weight, rows.T @ rows, quantizer.quantize(weight), 3)
    with torch.no_grad():
        block.choose_codes(lambda: block(hidden))
    assert set(block.factors.codes) == set(LINEARS)
    for name in LINEARS:
        same = (block.factors.codes[name] == expected[name]).float().mean()
        assert same > 0.97, name  # a tie decides about every channel after it
    folded = block.fold()
    assert all(torch.equal(folded.quantized[name].codes, block.factors.codes[name]) for name in LINEARS)


def shifting_block(make_llama: Callable[..., Path], rounding: str = "nearest") -> tuple[QuantizedBlock, Tensor]:
    """A block whose pairs have moved somewhere, and hidden states to run it on."""
    folder = make_llama(attention_bias=True, initializer_range=0.3)
    model = OmniQuantModel(
        str(folder), WeightSpec(3), ActivationSpec(6), transform=TransformSpec(), rounding=RoundingSpec(rounding)
    )  # type: ignore[arg-type]
    source, generator = model.source, torch.Generator().manual_seed(7)
    hidden = source.embed(torch.randint(0, 64, (4, 16), generator=generator))
    block = model.block(0, source.block_tensors(0), source.calls(16)[0], {})
    with torch.no_grad():
        for _, pair in block.factors.named_pairs():
            pair.scale.copy_(torch.exp(0.3 * torch.randn(pair.scale.shape, generator=generator)))
            if pair.shift is not None:
                pair.shift.copy_(torch.randn(pair.shift.shape, generator=generator))
    return block, hidden


def test_biases_of_shifts_are_those_of_the_fold_in_half_precision_too(make_llama: Callable[..., Path]) -> None:
    block, hidden = shifting_block(make_llama)
    exact = block.factors.transformed(block.tensors)["self_attn.o_proj.bias"]
    seen: list[Tensor] = []
    block.network.get_submodule("self_attn.o_proj").register_forward_pre_hook(
        lambda linear, _: seen.append(linear.bias.clone())
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = block(hidden)
        with block.held():
            block(hidden)
    assert output.requires_grad
    assert (exact - block.tensors["self_attn.o_proj.bias"]).abs().max() > 0.1
    assert len(seen) == 2
    assert all(torch.equal(bias, exact) for bias in seen)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every time that factors make something of weights: whether with gradients."""
    times: list[bool] = []
    compute = BlockFactors.forward
    monkeypatch.setattr(
        BlockFactors, "forward", lambda *arguments: times.append(torch.is_grad_enabled()) or compute(*arguments)
    )
    return times


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_that_are_held_are_computed_once_and_give_the_same(
    make_llama: Callable[..., Path], computed: list[bool], autocast: bool
) -> None:
    block, hidden = shifting_block(make_llama)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = [block(sample) for sample in hidden.split(1)]
        assert len(computed) == 4
        with block.held():
            found = [block(sample) for sample in hidden.split(1)]
        assert len(computed) == 5
        assert all(map(torch.equal, found, expected))
        for pair in block.factors.pairs.values():
            pair.scale.mul_(2)
        block(hidden)
    assert len(computed) == 6  # nothing is held any more


@pytest.mark.parametrize(("rounding", "passes"), [("nearest", 1), ("gptq", 2)])
def test_a_pass_over_all_samples_fake_quantizes_once(
    fit: Callable[..., SequentialTrainer], shallow: Path, computed: list[bool], rounding: str, passes: int
) -> None:
    """That of the initial loss, and that of the moments, one sample at a time."""
    model = OmniQuantModel(str(shallow), WeightSpec(3, 16), rounding=RoundingSpec(rounding))  # type: ignore[arg-type]
    fit(model, [], {"batch_size": 2, "micro_batch_size": 1}, max_epochs=0)
    assert computed == [False] * passes


def test_a_moment_of_several_linears_is_moved_once(
    make_llama: Callable[..., Path],
) -> None:
    block, hidden = shifting_block(make_llama, "gptq")
    shapes: list[tuple[int, ...]] = []

    class Moment:
        def __init__(self, second: Tensor) -> None:
            self._second = second

        @property
        def second(self) -> Tensor:
            shapes.append(tuple(self._second.shape))
            return self._second

    with torch.no_grad():
        block.choose_codes(
            lambda: block(hidden),
            lambda moments: {name: Moment(moment.second) for name, moment in moments.items()},  # type: ignore[misc]
        )
    assert sorted(shapes) == [(32, 32)] * 3 + [(48, 48)]  # of query, key and value; output; gate and up; down
    assert set(block.factors.codes) == set(LINEARS)
