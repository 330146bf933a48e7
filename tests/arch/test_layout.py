"""Families as data: every name must exist in transformers' own block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from omniquant_pl.arch import (
    BlockLayout,
    attention_shape,
    layout,
    layout_of,
    register,
    registered_families,
)
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.transform import AttentionShape

CONFIGS = {"llama": LlamaConfig(num_hidden_layers=1)}


@pytest.fixture
def block(family: str) -> nn.Module:
    """A block of the family, without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
    return model.get_submodule(layout_of(CONFIGS[family]).blocks)[0]


def test_every_family_has_a_configuration_here() -> None:
    assert set(registered_families()) == set(CONFIGS)


@pytest.mark.parametrize("family", CONFIGS)
class TestNames:
    def test_linears_are_all_linears_of_the_block(self, family: str, block: nn.Module) -> None:
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert set(layout_of(CONFIGS[family]).linears) == linears

    def test_attention_holds_projections(self, family: str, block: nn.Module) -> None:
        attention = block.get_submodule(layout_of(CONFIGS[family]).attention)
        assert any(isinstance(module, nn.Linear) for module in attention.children())

    def test_pairs_change_tensors_of_the_block(self, family: str, block: nn.Module) -> None:
        family_layout = layout_of(CONFIGS[family])
        tensors = {name: torch.empty(p.shape) for name, p in block.named_parameters()}
        shape = attention_shape(CONFIGS[family])
        pairs = [*family_layout.pairs, *family_layout.mlp_pairs]
        names = [pair.name for pair in pairs]
        assert len(set(names)) == len(names)
        for pair in pairs:
            weights = [n for n in pair.build(tensors, shape).changed if n.endswith(".weight")]
            assert len(weights) > 1
            assert set(weights) <= set(tensors)


def test_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"^model\.path: .*'gpt2'.*known: .*llama"):
        layout_of(GPT2Config())


def test_registration_makes_a_family_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_LAYOUTS", dict(layout._LAYOUTS))
    own = BlockLayout(blocks="h", attention="attn", linears=("fc",), pairs=())
    register("gpt2", own)
    assert layout_of(GPT2Config()) is own
    assert registered_families() == tuple(sorted({*CONFIGS, "gpt2"}))


class TestHeads:
    def test_as_configured(self) -> None:
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
        assert attention_shape(config) == AttentionShape(heads=4, kv_heads=2, head_dim=24)

    def test_families_without_kv_heads(self) -> None:
        config = PretrainedConfig(num_attention_heads=4, hidden_size=64)
        assert attention_shape(config) == AttentionShape(heads=4, kv_heads=4, head_dim=16)
