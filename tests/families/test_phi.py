"""Phi-1, Phi-1.5 and Phi-2, with and without norms of queries and keys."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PhiConfig, PretrainedConfig

from family_contract import FamilyTests
from omniquant_pl.families import family_of

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}

CONFIGS = {
    "phi-1": PhiConfig(**TINY),
    "phi-2": PhiConfig(
        **TINY, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    ),
    "grouped": PhiConfig(**(TINY | {"num_attention_heads": 4, "num_key_value_heads": 2})),
    "normed": PhiConfig(**TINY, qk_layernorm=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestPhi(FamilyTests):
    def test_shifts(self, contract: Any, config: PretrainedConfig) -> None:
        assert contract.shifted(config) == {"input_layernorm", "self_attn.v_proj"}


def test_the_norm_is_read_by_attention_and_mlp() -> None:
    layout = family_of(CONFIGS["phi-2"]).block(CONFIGS["phi-2"], 0)
    readers = [pair.linears for pair in layout.pairs if pair.name == "input_layernorm"]  # type: ignore[attr-defined]
    assert readers == [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")]
