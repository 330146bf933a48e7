"""Mixtral."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import MixtralConfig, PretrainedConfig

from omniquant_pl.spec import ActivationSpec

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
class TestMixtral:
    def test_equivalence(self, contract: Any, config: PretrainedConfig) -> None:
        assert contract.equivalence_error(config) <= 1e-5

    def test_linears(self, contract: Any, config: PretrainedConfig) -> None:
        assert contract.unlisted(config) == {"mlp.gate"}

    @pytest.mark.parametrize("activations", [None, ActivationSpec(6)], ids=["weights", "activations"])
    def test_round_trip(self, contract: Any, config: PretrainedConfig, activations: ActivationSpec | None) -> None:
        assert contract.round_trip_error(config, activations) <= 1e-5

    def test_attention_inputs(self, contract: Any, config: PretrainedConfig) -> None:
        assert max(contract.quantized_attention_inputs(config)) <= 8
