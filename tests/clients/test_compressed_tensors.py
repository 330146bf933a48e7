"""The compressed-tensors format, loaded by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec

pytestmark = pytest.mark.clients

FORMAT, PROGRAM = "compressed-tensors", "transformers with compressed-tensors"
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
WEIGHTS = [WeightSpec(bits, 64 if bits % 2 == 0 else None) for bits in range(2, 9)] + [
    WeightSpec(3, 64, symmetric=True),
    WeightSpec(4, symmetric=True),
    WeightSpec(4, 32, bits_of={"down_proj": 6, "fc2": 6}),
]
ACTIVATIONS = [
    (WeightSpec(4), ActivationSpec(4)),
    (WeightSpec(6), ActivationSpec(6)),
    (WeightSpec(8, symmetric=True), ActivationSpec(8)),
    (WeightSpec(4, 64), ActivationSpec(8)),
]


def save(config: PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def of_its_own(weights: WeightSpec, kinds: set[str]) -> WeightSpec:
    return WeightSpec(
        weights.bits,
        weights.group_size,
        weights.symmetric,
        bits_of={kind: bits for kind, bits in weights.bits_of.items() if kind in kinds},
    )


def check(exports: list[Any], found: list[Any]) -> None:
    errors = [exported.error(logits) for exported, logits in zip(exports, found, strict=True)]
    sizes = [exported.size_over_theory for exported in exports]
    print(f"{errors=} {sizes=}")
    assert max(errors) <= 1e-5
    for exported, logits in zip(exports, found, strict=True):
        if exported.model.scheme.activations is not None:
            assert logits.dtype == torch.float64
            assert exported.error(logits, quantizes_activations=False) > 1e-3


class TestEmbeddedModel:
    def test_weights(self, export: Callable[..., Any], load: Callable[..., Any]) -> None:
        schemes = [of_its_own(weights, {"down_proj"}) for weights in WEIGHTS]
        exports = [export(FORMAT, "tiny-llama", weights, transform=TransformSpec()) for weights in schemes]
        check(exports, load(FORMAT, PROGRAM, exports))
        assert max(exported.size_over_theory for exported in exports) <= 1.03

    def test_activations(self, export: Callable[..., Any], load: Callable[..., Any]) -> None:
        exports = [export(FORMAT, "tiny-llama", *scheme, transform=TransformSpec()) for scheme in ACTIVATIONS]
        check(exports, load(FORMAT, PROGRAM, exports))


@pytest.mark.reference
@pytest.mark.parametrize("name", ["llama", "llama-outliers", "opt-outliers"])
class TestReferenceModels:
    def test_weights(self, export: Callable[..., Any], load: Callable[..., Any], reference: Path, name: str) -> None:
        kinds = {"fc2"} if name.startswith("opt") else {"down_proj"}
        schemes = [of_its_own(weights, kinds) for weights in WEIGHTS]
        path = reference / "models" / name
        exports = [export(FORMAT, path, weights, transform=TransformSpec()) for weights in schemes]
        check(exports, load(FORMAT, PROGRAM, exports))
        assert max(exported.size_over_theory for exported in exports) <= 1.03

    def test_activations(
        self, export: Callable[..., Any], load: Callable[..., Any], reference: Path, name: str
    ) -> None:
        path = reference / "models" / name
        exports = [export(FORMAT, path, *scheme, transform=TransformSpec()) for scheme in ACTIVATIONS]
        check(exports, load(FORMAT, PROGRAM, exports))


def test_families(export: Callable[..., Any], load: Callable[..., Any], tmp_path: Path) -> None:
    symmetric, opt = WeightSpec(3, 32, symmetric=True), {"ffn_dim": 96, "word_embed_proj_dim": 32}
    opt |= {key: size for key, size in SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")}
    opt["init_std"] = opt.pop("initializer_range")
    models: dict[str, tuple[PretrainedConfig, WeightSpec, ActivationSpec | None]] = {
        "odd": (
            LlamaConfig(**(SIZES | {"hidden_size": 40, "intermediate_size": 72}), head_dim=12),
            WeightSpec(5),
            None,
        ),
        "phi3": (Phi3Config(**SIZES), WeightSpec(4, 16), None),
        "phi3-activations": (Phi3Config(**SIZES), WeightSpec(4), ActivationSpec(4)),
        "qwen3-activations": (Qwen3Config(**SIZES, head_dim=32), WeightSpec(8), ActivationSpec(8)),
        "gemma3-activations": (Gemma3TextConfig(**SIZES, head_dim=16), WeightSpec(6), ActivationSpec(6)),
        "opt-350m": (OPTConfig(**opt, do_layer_norm_before=False), WeightSpec(4, 32), None),
        "opt-activations": (OPTConfig(**opt), WeightSpec(8), ActivationSpec(8)),
        "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), symmetric, None),
        "qwen2-mixture": (
            Qwen2MoeConfig(
                **SIZES,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=64,
                num_experts=4,
                num_experts_per_tok=2,
            ),
            symmetric,
            None,
        ),
    }
    exports = [export(FORMAT, save(config, tmp_path / name), *scheme) for name, (config, *scheme) in models.items()]
    check(exports, load(FORMAT, PROGRAM, exports))
