"""Starting points: what zero epochs give, and that searches find what they promise, recomputed in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import ChannelRange
from omniquant_pl.quant.moments import observe_samples
from omniquant_pl.spec import ActivationSpec, ClippingSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

TOKENS = 16
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
READERS = {
    "input_layernorm": LINEARS[:3],
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
"""The linears of a LLaMA block whose inputs a pair divides, by its name."""


def quantize_rows(rows: np.ndarray, bits: int, share: float = 1.0, dtype: Any = np.float64) -> np.ndarray:
    """Asymmetric fake quantization of every row with a share of its own range; the scale is stored in a dtype."""
    low = np.minimum(rows.min(1, keepdims=True), 0) * share
    high = np.maximum(rows.max(1, keepdims=True), 0) * share
    scale = ((high - low) / (2**bits - 1)).astype(dtype).astype(rows.dtype)
    zero = np.round(-low / scale)
    return (np.clip(np.round(rows / scale) + zero, 0, 2**bits - 1) - zero) * scale


def quantize_weight(weight: np.ndarray, spec: WeightSpec, **options: Any) -> np.ndarray:
    size = spec.group_size or weight.shape[1]
    return quantize_rows(weight.reshape(-1, size), spec.bits, **options).reshape(weight.shape)


@dataclass
class Block:
    """The first block of a LLaMA with its starting point, and what is known about its linears' inputs."""

    model: OmniQuantModel
    factors: Any
    tensors: dict[str, Tensor]
    samples: dict[str, Tensor]

    def output_error(self, linears: tuple[str, ...], divisor: Tensor) -> float:
        """Squared error of what these linears make of their sampled inputs, all products written out."""
        weights, activations = self.model.scheme.weights, self.model.scheme.activations
        rows, scale = self.samples[linears[0]].double().numpy(), divisor.double().numpy()
        scaled = rows / scale if activations is None else quantize_rows(rows / scale, activations.bits)
        error = 0.0
        for name in linears:
            weight = self.tensors[f"{name}.weight"].double().numpy()
            error += float(np.square(scaled @ quantize_weight(weight * scale, weights).T - rows @ weight.T).sum())
        return error

    def divisor(self, pair: str, scale: Tensor) -> Tensor:
        """A pair's scale for every input channel: query heads share that of their kv head, 2 of 8 channels here."""
        return scale.view(2, 1, 8).expand(2, 2, 8).reshape(-1) if pair == "self_attn.v_proj" else scale

    def shared(self, pair: str, per_channel: Tensor) -> Tensor:
        """The largest of the channels that share a scale."""
        return per_channel.view(2, 2, 8).amax(1).view(-1) if pair == "self_attn.v_proj" else per_channel


@pytest.fixture
def start(make_llama: Callable[..., Path]) -> Callable[..., Block]:
    """Prepares the first block of a LLaMA with outlier channels, two query heads for each kv head."""

    def start(weights: WeightSpec, **settings: Any) -> Block:
        model = OmniQuantModel(str(make_llama(num_key_value_heads=2)), weights, **settings)
        source = model.source
        call, tensors = source.calls(TOKENS)[0], source.block_tensors(0)
        tensors["input_layernorm.weight"][::9] *= 20
        tensors["post_attention_layernorm.weight"][3] *= 30
        tensors["self_attn.v_proj.weight"][5] *= 15
        tensors["mlp.up_proj.weight"][7] *= 15
        hidden = torch.randn(4, TOKENS, 32, generator=torch.Generator().manual_seed(1))
        original = source.make_block(0, tensors)
        with torch.no_grad(), observe_samples(original, LINEARS) as samples:
            call(original, hidden)
        rows = {name: sample.rows for name, sample in samples.items()}
        ranges = {name: ChannelRange.of(row) for name, row in rows.items()}
        return Block(model, model.block(0, tensors, call, ranges, rows).factors, tensors, rows)

    return start


SCHEMES = {
    "w3g16": (WeightSpec(3, 16), None),
    "w4a4": (WeightSpec(4), ActivationSpec(4)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
class TestSearchedScales:
    def test_no_alpha_alone_has_a_smaller_error(self, start: Callable[..., Block], scheme: str) -> None:
        weights, activations = SCHEMES[scheme]
        block = start(weights, activations=activations, transform=TransformSpec(initial="search", mlp=True))
        gained = 0
        for name, pair in block.factors.named_pairs():
            if name not in READERS:
                assert bool((pair.scale == 1).all())  # queries and keys
                continue
            readers = READERS[name]
            largest = block.shared(name, block.samples[readers[0]].abs().amax(0))
            weight = torch.stack([block.tensors[f"{reader}.weight"].abs().amax(0) for reader in readers]).amax(0)
            candidates = {
                alpha: largest**alpha / block.shared(name, weight) ** (1 - alpha) for alpha in np.arange(21) / 20
            } | {None: torch.ones_like(largest)}
            errors = {a: block.output_error(readers, block.divisor(name, s)) for a, s in candidates.items()}
            found = block.output_error(readers, block.divisor(name, pair.scale.detach()))
            assert found <= min(errors.values()) * (1 + 1e-3), name
            chosen = [s for s in candidates.values() if torch.allclose(s, pair.scale, rtol=1e-4)]
            assert chosen, f"{name} has none of the scales that were tried"
            gained += found < 0.9 * errors[None]
        assert gained >= 3

    def test_no_power_of_the_mean_has_a_smaller_error(self, start: Callable[..., Block], scheme: str) -> None:
        weights, activations = SCHEMES[scheme]
        block = start(weights, activations=activations, transform=TransformSpec(initial="awq", mlp=True))
        gained = 0
        for name, pair in block.factors.named_pairs():
            if name not in READERS:
                assert bool((pair.scale == 1).all())
                continue
            mean = block.samples[READERS[name][0]].abs().mean(0)
            powers = [mean ** (step / 20) for step in range(21)]
            scales = [block.shared(name, power / (power.max() * power.min()).sqrt()) for power in powers]
            errors = [block.output_error(READERS[name], block.divisor(name, scale)) for scale in scales]
            found = block.output_error(READERS[name], block.divisor(name, pair.scale.detach()))
            assert found <= min(errors) * (1 + 1e-3), name
            assert any(torch.allclose(scale, pair.scale, rtol=1e-3) for scale in scales), name
            gained += found < 0.9 * errors[0]  # of ones
        assert gained >= 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transform", [None, TransformSpec(initial="awq", mlp=True)], ids=["plain", "awq"])
@pytest.mark.parametrize("initial", [0.4, 2.5, 20.0])
def test_searched_clipping_has_the_least_error_below_its_cap(
    start: Callable[..., Block], scheme: str, transform: TransformSpec | None, initial: float
) -> None:
    """Of the transformed weights, for the inputs that they meet; one channel's groups at a time."""
    (weights, activations), clipping = SCHEMES[scheme], ClippingSpec(initial=initial, search=True)
    block = start(weights, activations=activations, transform=transform, clipping=clipping)
    factors = block.factors.export()
    transformed = block.factors.transformed(block.tensors)
    divisors = {
        reader: block.divisor(pair, factors[f"{pair}.scale"])
        for pair, readers in READERS.items()
        for reader in readers
        if transform is not None
    }
    cap, shares = float(torch.sigmoid(torch.tensor(initial))), np.linspace(1, 0.5, 20)
    found = {name: torch.sigmoid(factors[f"{name}.clip.upper"]).numpy() for name in LINEARS}
    for name, share in found.items():
        assert np.array_equal(factors[f"{name}.clip.upper"], factors[f"{name}.clip.lower"])
        assert share.min() >= 0.499
        assert share.max() <= cap + 1e-6
    assert any(share.max() == pytest.approx(cap) for share in found.values())
    compared = 0
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        rows = (block.samples[name] / divisors.get(name, torch.ones(()))).double().numpy()
        if activations is not None:
            rows = quantize_rows(rows, activations.bits)
        weight = transformed[f"{name}.weight"].detach().double().numpy()
        size = weights.group_size or weight.shape[1]
        for group in range(weight.shape[1] // size):
            part = slice(group * size, (group + 1) * size)
            tried = [quantize_rows(weight[:, part], weights.bits, share) - weight[:, part] for share in shares]
            errors = np.stack([np.square(rows[:, part] @ error.T).sum(0) for error in tried])  # [shares, out]
            # What lies above the cap ends at the cap: compare where the best share is below it.
            below = np.flatnonzero(shares[errors.argmin(0)] < cap - 1e-6)
            chosen = np.abs(shares[:, None] - found[name][:, group]).argmin(0)
            best = errors.min(0)
            assert (errors[chosen[below], below] <= best[below] * (1 + 1e-3)).all()
            compared += len(below)
    assert compared > (10 if initial > 10 else 0) or initial < 1


class Start(CalibrationCallback):
    """What every block's factors make of its original tensors before anything is learned."""

    def __init__(self) -> None:
        self.tensors: list[dict[str, Tensor]] = []
        self.factors: list[dict[str, Tensor]] = []
        self.blocks: list[QuantizedBlock] = []

    def on_block_start(self, trainer: Any, block: QuantizedBlock) -> None:
        transformed = block.factors.transformed(block.tensors)
        self.tensors.append({name: tensor.detach().clone() for name, tensor in transformed.items()})
        self.factors.append({name: factor.clone() for name, factor in block.factors.export().items()})
        self.blocks.append(block)


def random_model(config: PretrainedConfig, folder: Path) -> Path:
    """With some channels of every norm ten times as large as the others: there is something to find."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
                parameter[::10] *= 10
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = TINY | {"num_key_value_heads": 2, "intermediate_size": 48}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
CONFIGS = {
    "falcon-40b": FalconConfig(**TINY, ffn_hidden_size=48, num_kv_heads=2, new_decoder_architecture=True),
    "phi3": Phi3Config(**GROUPED),
    "mixtral": MixtralConfig(**(EXPERTS | {"intermediate_size": 24}), num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**EXPERTS, moe_intermediate_size=24, num_experts=4, shared_expert_intermediate_size=40),
    "opt": OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32),
}


@pytest.mark.parametrize(
    ("family", "initial"),
    [("llama-gqa", "awq"), *((family, "awq") for family in CONFIGS), ("mixtral", "search"), ("opt", "search")],
)
def test_searched_scales_change_nothing_before_quantization(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    logits_of: Callable[..., Tensor],
    tokens: Tensor,
    tmp_path: Path,
    family: str,
    initial: Any,
) -> None:
    """Fused projections, shared heads, experts that see different tokens, shifts: all with what was found."""
    if family == "llama-gqa":
        folder = make_llama(num_key_value_heads=2)
    else:
        folder = random_model(CONFIGS[family], tmp_path / "source")
    begin = Start()
    model = OmniQuantModel(
        str(folder),
        WeightSpec(3, 16),
        ActivationSpec(8),
        ClippingSpec(search=True),
        TransformSpec(initial=initial, mlp=True),
    )
    fit(model, [begin], max_epochs=0)
    source = model.source
    hidden, calls = source.embed(tokens), source.calls(tokens.shape[1])
    for index, tensors in enumerate(begin.tensors):
        changed = [n for n, f in begin.factors[index].items() if n.endswith(".scale") and bool((f != 1).any())]
        assert len(changed) >= 2
        assert all(bool(torch.isfinite(factor).all()) for factor in begin.factors[index].values())
        assert all(bool((f > 0).all()) for n, f in begin.factors[index].items() if n.endswith(".scale"))
        if family == "opt":
            assert any(n.endswith(".shift") and bool((f != 0).any()) for n, f in begin.factors[index].items())
        with torch.no_grad():
            hidden = calls[index](source.make_block(index, tensors), hidden)
    expected, found = logits_of(folder, tokens), source.logits(hidden)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    folded = [tensor for block in begin.blocks for tensor in block.tensors.values()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in folded)


def weights_of(folder: Path) -> Iterator[tuple[int, str, np.ndarray]]:
    """Block, name and weight of every quantized linear, from the file."""
    stored = load_file(folder / "model.safetensors")
    for index in range(2):
        for name in LINEARS:
            yield index, name, stored[f"model.layers.{index}.{name}.weight"].numpy()


@pytest.mark.parametrize("transform", [None, TransformSpec(initial="ones", mlp=True)], ids=["none", "ones"])
@pytest.mark.parametrize("weights", [WeightSpec(3, 16), WeightSpec(4)], ids=["w3g16", "w4"])
def test_without_clipping_and_scales_zero_epochs_are_round_to_nearest(
    llama: Path, fit: Callable[..., SequentialTrainer], weights: WeightSpec, transform: TransformSpec | None
) -> None:
    """Of the weights in the file, with the full range of each group and its scale in float16."""
    begin = Start()
    fit(OmniQuantModel(str(llama), weights, clipping=None, transform=transform), [begin], max_epochs=0)
    for index, name, weight in weights_of(llama):
        expected = quantize_weight(weight, weights, dtype=np.float16)
        assert expected.dtype == np.float32
        found = begin.blocks[index].tensors[f"{name}.weight"].numpy()
        same = np.isclose(found, expected, rtol=1e-6, atol=1e-7)
        assert same.mean() > 0.998, name  # but for ties, which a division may put on either side
        assert not np.allclose(found, weight, rtol=1e-2)


def test_searches_lower_the_error_of_a_block_without_an_epoch(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    """Behind the whole block, in the order of the options: nothing, a fixed alpha, what was searched for."""

    class Errors(CalibrationCallback):
        def on_block_end(self, trainer: Any, block: QuantizedBlock, result: Any) -> None:
            found[name].append((result.relative_error, result.relative_error_rtn))

    runs: Mapping[str, dict[str, Any]] = {
        "nearest": {"clipping": None},
        "clipping": {"clipping": ClippingSpec(search=True, initial=20.0)},
        "awq": {"clipping": None, "transform": TransformSpec(initial="awq")},
        "awq-clipping": {
            "clipping": ClippingSpec(search=True, initial=20.0),
            "transform": TransformSpec(initial="awq"),
        },
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for name, settings in runs.items():
        model = OmniQuantModel(str(llama), WeightSpec(2, 16), **settings)
        fit(model, [Errors()], max_epochs=0, default_root_dir=tmp_path / name)
    first = {name: errors[0] for name, errors in found.items()}
    assert all(error == nearest for error, nearest in found["nearest"])
    assert len({nearest for _, nearest in first.values()}) == 1
    assert first["clipping"][0] < 0.95 * first["nearest"][0]
    assert first["awq-clipping"][0] < 0.95 * first["awq"][0]
