"""Phi-3 and Phi-4: sliding windows, grouped queries, partial and long rotary embeddings."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Phi3Config, PretrainedConfig

from family_contract import FamilyTests

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _long(original: int, partial: float, **changes: Any) -> Phi3Config:
    """A model whose rotary embedding changes behind that many tokens; the tests' sequences have 24."""
    pairs = int(16 * partial) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [2.0 + 0.5 * pair for pair in range(pairs)],
    }
    config = TINY | {"max_position_embeddings": 64, "original_max_position_embeddings": original}
    return Phi3Config(**(config | changes), rope_parameters=rope)


CONFIGS = {
    "phi-3-mini-4k": Phi3Config(**TINY, sliding_window=8),
    "phi-3-medium": Phi3Config(**(TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})),
    "phi-3-mini-128k-short": _long(32, 1.0),
    "phi-3-mini-128k-long": _long(16, 1.0),
    "phi-4-mini": _long(16, 0.75, num_key_value_heads=1, tie_word_embeddings=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestPhi3(FamilyTests):
    def test_without_biases_nothing_shifts(self, contract: Any, config: PretrainedConfig) -> None:
        assert contract.shifted(config) == set()
