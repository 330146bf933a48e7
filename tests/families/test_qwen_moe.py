"""Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from family_contract import FamilyTests
from omniquant_pl.families import family_of

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

QWEN3 = {
    "qwen3": Qwen3MoeConfig(**TINY, head_dim=16, norm_topk_prob=True),
    "qwen3-biases": Qwen3MoeConfig(**TINY, head_dim=8, attention_bias=True, mlp_only_layers=[1]),
}
QWEN2 = {
    "qwen2": Qwen2MoeConfig(**TINY, shared_expert_intermediate_size=40),
    "qwen2-sliding": Qwen2MoeConfig(
        **TINY, shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
}
CONFIGS = QWEN3 | QWEN2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestQwenMoe(FamilyTests):
    def unquantized(self, config: PretrainedConfig) -> set[str]:
        shared = {"mlp.shared_expert_gate"} if config.model_type == "qwen2_moe" else set()
        return {"mlp.gate"} | shared


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, []),
        ({"mlp_only_layers": [1, 2]}, [1, 2]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 2, 3]),
        ({"num_experts": 0}, [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("kind", [Qwen2MoeConfig, Qwen3MoeConfig])
def test_dense_blocks_are_those_of_transformers(
    kind: type[PretrainedConfig], changes: dict[str, Any], dense: list[int]
) -> None:
    config = kind(**(TINY | {"num_hidden_layers": 4} | changes))
    with torch.device("meta"):
        blocks = AutoModelForCausalLM.from_config(config).model.layers
    layouts = [family_of(config).block(config, index) for index in range(4)]
    assert [index for index, layout in enumerate(layouts) if layout.experts is None] == dense
    assert [index for index, block in enumerate(blocks) if not hasattr(block.mlp, "experts")] == dense


def test_a_dense_block_among_mixtures(contract: Any) -> None:
    config = Qwen3MoeConfig(**(TINY | {"decoder_sparse_step": 2}), head_dim=16)
    assert contract.unlisted(config, 0) == set()
    assert contract.unlisted(config, 1) == {"mlp.gate"}
    assert contract.equivalence_error(config) <= 1e-5
    assert contract.round_trip_error(config) <= 1e-5
