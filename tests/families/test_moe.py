"""Checkpoints of mixtures: single experts, as they are published, and transformers' 3-D tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
QWEN = TINY | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS = {
    "mixtral": MixtralConfig(**TINY, num_local_experts=3),
    "qwen2": Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20),
    "qwen3": Qwen3MoeConfig(**QWEN, head_dim=8, mlp_only_layers=[0]),
}
BLOCK = "model.layers.1."
PUBLISHED = {
    "mixtral": [f"block_sparse_moe.experts.2.{kind}.weight" for kind in ("w1", "w2", "w3")],
    "qwen2": [f"mlp.experts.2.{kind}_proj.weight" for kind in ("gate", "up", "down")],
    "qwen3": [f"mlp.experts.2.{kind}_proj.weight" for kind in ("gate", "up", "down")],
}


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str) -> PretrainedConfig:
    return CONFIGS[name]


@pytest.fixture
def published(contract: Any, config: PretrainedConfig) -> Path:
    return Path(contract.save(config))


@pytest.fixture
def fused(contract: Any, published: Path) -> Path:
    folder: Path = contract.folder / "fused"
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    model.save_pretrained(folder, save_original_format=False)
    assert f"{BLOCK}mlp.experts.gate_up_proj" in names_in(folder)
    return folder


def test_transformers_saves_the_published_names(name: str, published: Path) -> None:
    """The premise of all the rest: what is exported under these names is what other programs load."""
    assert {f"{BLOCK}{tensor}" for tensor in PUBLISHED[name]} <= names_in(published)


def test_exports_have_the_published_names(contract: Any, config: PretrainedConfig, published: Path) -> None:
    assert contract.round_trip_error(config) <= 1e-5
    assert names_in(contract.folder / "exported") == names_in(published)


def test_fused_experts_are_the_same_experts(published: Path, fused: Path) -> None:
    one, other = SourceModel(published), SourceModel(fused)
    other.verify()
    assert other.checkpoint.names() == one.checkpoint.names()
    assert other.non_block_names == one.non_block_names
    for index in range(2):
        assert other.stored_names(index) == one.stored_names(index)
        torch.testing.assert_close(other.block_tensors(index), one.block_tensors(index), rtol=0, atol=0)


def test_fused_experts_are_exported_one_by_one(
    contract: Any, config: PretrainedConfig, published: Path, fused: Path
) -> None:
    assert contract.round_trip_error(config, stored_as=fused) <= 1e-5
    assert names_in(contract.folder / "exported") == names_in(published)


def test_fused_experts_of_another_shape_are_refused(fused: Path) -> None:
    tensors = load_file(fused / "model.safetensors")
    name = f"{BLOCK}mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"^model\.path: .*experts\.0\.\S+ has shape"):
        SourceModel(fused).verify()
