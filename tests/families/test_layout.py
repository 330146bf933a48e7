"""The registry of families."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import BlockLayout, Family, attention_shape, family_of, layout, register, registered_families
from omniquant_pl.transform import AttentionShape

OWN = Family(blocks="transformer.h", block=lambda config, index: BlockLayout("attn", ("fc",), ()))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_FAMILIES", dict(layout._FAMILIES))


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"^model\.path: .*'gpt2'.*known: .*llama"):
        family_of(GPT2Config())


def test_registration_makes_a_family_known() -> None:
    before = registered_families()
    register("gpt2", OWN, blocks="h")
    assert family_of(GPT2Config()).blocks == "h"
    assert registered_families() == tuple(sorted({*before, "gpt2"}))


def test_a_model_that_its_family_refuses_is_refused_with_the_reason() -> None:
    register("gpt2", OWN, refuse=lambda config: "it is odd" if config.n_layer == 3 else None)
    assert family_of(GPT2Config(n_layer=2)).blocks == "transformer.h"
    with pytest.raises(ConfigurationError, match=r"^model\.path: this gpt2 model is not supported: it is odd"):
        family_of(GPT2Config(n_layer=3))


class TestHeads:
    def test_as_configured(self) -> None:
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
        assert attention_shape(config) == AttentionShape(heads=4, kv_heads=2, head_dim=24)

    def test_families_without_kv_heads(self) -> None:
        config = PretrainedConfig(num_attention_heads=4, hidden_size=64)
        assert attention_shape(config) == AttentionShape(heads=4, kv_heads=4, head_dim=16)
