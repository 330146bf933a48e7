"""The gptq format, loaded by transformers with gptqmodel, and by auto-round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig, Qwen3Config

from omniquant_pl.spec import TransformSpec, WeightSpec

pytestmark = pytest.mark.clients

PROGRAM = "transformers with gptqmodel"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
WIDTHS = [
    WeightSpec(2, 64),
    WeightSpec(3),
    WeightSpec(3, 64, symmetric=True),
    WeightSpec(4, 64),
    WeightSpec(4),
    WeightSpec(8),
    WeightSpec(8, 64, symmetric=True),
]


def save(config: PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_embedded_model(export: Callable[..., Any], load: Callable[..., Any]) -> None:
    exports = [export("gptq", "tiny-llama", weights, transform=TransformSpec()) for weights in WIDTHS]
    errors = [exported.error(found) for exported, found in zip(exports, load("gptq", PROGRAM, exports), strict=True)]
    sizes = [exported.size_over_theory for exported in exports]
    print(f"{errors=} {sizes=}")
    assert max(errors) <= 1e-5
    assert max(sizes) <= 1.03


@pytest.mark.reference
@pytest.mark.parametrize("name", ["llama", "llama-outliers", "opt-outliers"])
def test_reference_models(export: Callable[..., Any], load: Callable[..., Any], reference: Path, name: str) -> None:
    exports = [export("gptq", reference / "models" / name, weights, transform=TransformSpec()) for weights in WIDTHS]
    errors = [exported.error(found) for exported, found in zip(exports, load("gptq", PROGRAM, exports), strict=True)]
    sizes = [exported.size_over_theory for exported in exports]
    print(f"{errors=} {sizes=}")
    assert max(errors) <= 1e-5
    assert max(sizes) <= 1.03


def test_families(export: Callable[..., Any], load: Callable[..., Any], tmp_path: Path) -> None:
    configs = {
        "qwen3": (Qwen3Config(**SIZES, head_dim=32), WeightSpec(3, 32)),
        "phi3": (Phi3Config(**SIZES), WeightSpec(4, 16)),
        "gemma3": (Gemma3TextConfig(**SIZES, head_dim=16), WeightSpec(2)),
        "odd": (LlamaConfig(**(SIZES | {"hidden_size": 40, "intermediate_size": 72}), head_dim=12), WeightSpec(4)),
        "short": (LlamaConfig(**SIZES, tie_word_embeddings=True), WeightSpec(8, 128)),
    }
    exports = [export("gptq", save(config, tmp_path / name), weights) for name, (config, weights) in configs.items()]
    found = load("gptq", PROGRAM, exports)
    errors = {name: exported.error(logits) for name, exported, logits in zip(configs, exports, found, strict=True)}
    assert max(errors.values()) <= 1e-5, errors


def test_gptqmodel_itself_rounds(export: Callable[..., Any], load: Callable[..., Any], tmp_path: Path) -> None:
    """Told to use float32 it still holds biases, and products of codes and scales, in float16: the file is exact."""
    source = save(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), tmp_path / "biased")
    exports = [export("gptq", source, WeightSpec(4, 16))]
    assert exports[0].error(*load("gptq", "gptqmodel in half", exports)) > 1e-4
    assert exports[0].error(*load("gptq", PROGRAM, exports)) <= 1e-5


def test_auto_round_reads_the_same_codes(export: Callable[..., Any], load: Callable[..., Any]) -> None:
    """Told, by a packing format of its own, that zero points are stored as they are."""
    schemes = [WeightSpec(2, 64), WeightSpec(3), WeightSpec(4, 64), WeightSpec(8, 64, symmetric=True)]
    exports = [export("gptq", "tiny-llama", weights) for weights in schemes]
    found = load("gptq", "auto-round", exports)
    assert max(exported.error(logits) for exported, logits in zip(exports, found, strict=True)) <= 1e-5
