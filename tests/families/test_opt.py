"""OPT, norms before and after the residual sum."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import OPTConfig

from family_contract import FamilyTests

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 32,
}

CONFIGS = {
    "opt": OPTConfig(**TINY),
    "opt-350m": OPTConfig(**(TINY | {"word_embed_proj_dim": 16}), do_layer_norm_before=False),
    "galactica": OPTConfig(**TINY, activation_function="gelu", enable_bias=False),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestOpt(FamilyTests):
    """The contract alone."""


def test_shifts(contract: Any) -> None:
    expected = {"self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm"}
    assert contract.shifted(CONFIGS["opt"]) == expected


def test_norms_behind_the_residual_sum_are_left_alone(contract: Any) -> None:
    assert contract.shifted(CONFIGS["opt-350m"]) == {"self_attn.v_proj"}


def test_without_biases_nothing_shifts(contract: Any) -> None:
    assert contract.shifted(CONFIGS["galactica"]) == set()
