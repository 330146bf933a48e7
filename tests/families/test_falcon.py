"""Falcon in its layouts: 7B, 40B, 11B, RW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, PretrainedConfig
from transformers.models.falcon.modeling_falcon import FalconLinear

from family_contract import FamilyTests
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import family_of
from omniquant_pl.nn import QuantLinear

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_hidden_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = TINY | {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
RW = TINY | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}

CONFIGS = {
    "falcon-7b": FalconConfig(**TINY),
    "falcon-40b": FalconConfig(**GROUPED, tie_word_embeddings=False),
    "falcon-11b": FalconConfig(**GROUPED, num_ln_in_parallel_attn=1),
    "falcon-rw": FalconConfig(**RW),
    "rw-rotary": FalconConfig(**(RW | {"alibi": False})),
    "7b-alibi": FalconConfig(**TINY, alibi=True, bias=True),
    "40b-biases": FalconConfig(**GROUPED, bias=True),
}

VALUES = "self_attention.query_key_value.value"
SHIFTS = {
    "falcon-7b": set(),
    "falcon-40b": set(),
    "falcon-11b": set(),
    "falcon-rw": {"input_layernorm", "post_attention_layernorm", VALUES},
    "rw-rotary": {"input_layernorm", "post_attention_layernorm", VALUES},
    "7b-alibi": {"input_layernorm", VALUES},
    "40b-biases": {"ln_attn", "ln_mlp", VALUES},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestFalcon(FamilyTests):
    def test_a_batch_is_its_samples(self, contract: Any, config: PretrainedConfig) -> None:
        tokens = contract.tokens(config)
        source = SourceModel(contract.save(config))
        call, network = source.calls(tokens.shape[1])[1], source.make_block(1, source.block_tensors(1))
        with torch.no_grad():
            hidden = source.embed(tokens)
            together = call(network, hidden)
            apart = torch.cat([call(network, sample) for sample in hidden.split(1)])
        assert together.shape == hidden.shape
        assert (together - apart).abs().max() <= 1e-5 * together.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_shifts(contract: Any, name: str) -> None:
    assert contract.shifted(CONFIGS[name]) == SHIFTS[name]


@pytest.mark.parametrize("bias", [False, True])
def test_its_linears_are_linears(bias: bool) -> None:
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    linear = FalconLinear(8, 6, bias=bias)
    assert isinstance(linear, nn.Linear)
    torch.testing.assert_close(QuantLinear.of(linear, None)(hidden), linear(hidden))


def test_a_layout_that_transformers_does_not_run_is_refused() -> None:
    config = FalconConfig(new_decoder_architecture=True, parallel_attn=False)
    with pytest.raises(ConfigurationError, match=r"^model\.path: this falcon model .*parallel_attn"):
        family_of(config)
