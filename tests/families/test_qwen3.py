"""Qwen3, dense."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen3Config

from family_contract import FamilyTests

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}

CONFIGS = {
    "qwen3": Qwen3Config(**TINY),
    "qwen3-small": Qwen3Config(**(TINY | {"num_key_value_heads": 4}), tie_word_embeddings=True),
    "qwen3-biases-sliding": Qwen3Config(
        **TINY, attention_bias=True, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3-yarn": Qwen3Config(**TINY, rope_parameters=YARN),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestQwen3(FamilyTests):
    """The contract alone."""


def test_shifts_need_biases(contract: Any) -> None:
    assert contract.shifted(CONFIGS["qwen3"]) == set()
    assert contract.shifted(CONFIGS["qwen3-biases-sliding"]) == {"self_attn.v_proj"}
