"""LLaMA, Mistral, Qwen2."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from family_contract import FamilyTests

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": LlamaConfig(**TINY, attention_bias=True),
    "llama-3-rope": LlamaConfig(
        **TINY,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral-sliding": MistralConfig(**TINY, head_dim=16, sliding_window=8),
    "qwen2": Qwen2Config(**(TINY | {"tie_word_embeddings": True})),
    "qwen2-sliding": Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestLlama(FamilyTests):
    """The contract alone."""
