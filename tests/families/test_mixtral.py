"""Mixtral."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import MixtralConfig, PretrainedConfig

from family_contract import FamilyTests

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

CONFIGS = {
    "mixtral": MixtralConfig(**TINY),
    "mixtral-sliding": MixtralConfig(**TINY, head_dim=16, sliding_window=8),
    "one-expert-a-token": MixtralConfig(**TINY, num_experts_per_tok=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestMixtral(FamilyTests):
    def unquantized(self, config: PretrainedConfig) -> set[str]:
        return {"mlp.gate"}
