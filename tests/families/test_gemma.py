"""Gemma 1, 2 and 3, and Gemma 3 with a vision encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma3Config, Gemma3TextConfig, GemmaConfig, PretrainedConfig

from family_contract import FamilyTests
from omniquant_pl.checkpoint import Checkpoint, SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import family_of

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
# A model of its own scale of logits, a cap that they reach, windows shorter than the sequence.
GEMMA2: dict[str, Any] = TINY | {"query_pre_attn_scalar": 2, "attn_logit_softcapping": 0.5, "sliding_window": 8}
GEMMA3: dict[str, Any] = TINY | {
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}

CONFIGS = {
    "gemma": GemmaConfig(**TINY),
    "gemma-mqa-biases": GemmaConfig(**(TINY | {"num_key_value_heads": 1}), attention_bias=True),
    "gemma2": Gemma2Config(**GEMMA2),
    "gemma2-biases": Gemma2Config(**GEMMA2, attention_bias=True),
    "gemma3-text": Gemma3TextConfig(**GEMMA3, rope_parameters=ROPES),
    "gemma3-text-biases": Gemma3TextConfig(
        **GEMMA3, attention_bias=True, tie_word_embeddings=False, final_logit_softcapping=2.0
    ),
    "gemma3": Gemma3Config(
        text_config=GEMMA3 | {"rope_parameters": ROPES},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=63,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
class TestGemma(FamilyTests):
    """The contract alone."""


OPTIONS = {
    "attention-cap": (CONFIGS["gemma2"], {"attn_logit_softcapping": None}),
    "logit-cap": (CONFIGS["gemma2"], {"final_logit_softcapping": 1.0}),
    "scaling-gemma2": (CONFIGS["gemma2"], {"query_pre_attn_scalar": 32}),
    "scaling-gemma3": (CONFIGS["gemma3-text"], {"query_pre_attn_scalar": 2}),
    "windows-gemma2": (CONFIGS["gemma2"], {"sliding_window": 4}),
    "windows-gemma3": (CONFIGS["gemma3-text"], {"sliding_window": 4}),
    "layer-types": (CONFIGS["gemma3-text"], {"layer_types": ["full_attention", "sliding_attention"]}),
    "rotary-bases": (CONFIGS["gemma3-text"], {"rope_parameters": dict.fromkeys(ROPES, ROPES["full_attention"])}),
}


@pytest.mark.parametrize(("config", "changes"), OPTIONS.values(), ids=OPTIONS)
def test_options_reach_the_blocks(contract: Any, config: PretrainedConfig, changes: dict[str, Any]) -> None:
    """What transformers computes changes with each option, and block by block it comes out the same."""
    changed = type(config)(**(config.to_dict() | changes))
    tokens, expected, found = contract.tokens(config), [], []
    for variant in (config, changed):
        folder = contract.save(variant)
        expected.append(contract.expected_logits(folder, tokens))
        source = SourceModel(folder)
        calls, hidden = source.calls(tokens.shape[1]), source.embed(tokens)
        with torch.no_grad():
            for index, call in enumerate(calls):
                hidden = call(source.make_block(index, source.block_tensors(index)), hidden)
        found.append(source.logits(hidden))
    power = expected[0].abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * power
    assert max((one - other).abs().max() for one, other in zip(found, expected, strict=True)) <= 1e-5 * power


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3-text", "gemma3"])
def test_embeddings_are_scaled(contract: Any, name: str) -> None:
    """The factor is a buffer that no checkpoint stores; the model is built without storage."""
    source, tokens = SourceModel(contract.save(CONFIGS[name])), contract.tokens(CONFIGS[name])
    stored = next(name for name in source.non_block_names if name.endswith("embed_tokens.weight"))
    weight = source.checkpoint.read((stored,))[stored]
    torch.testing.assert_close(source.embed(tokens), weight[tokens] * 32**0.5)


def test_shifts_need_biases(contract: Any) -> None:
    assert contract.shifted(CONFIGS["gemma2"]) == set()
    assert contract.shifted(CONFIGS["gemma2-biases"]) == {"self_attn.v_proj"}


@pytest.mark.parametrize("kind", [GemmaConfig, Gemma2Config, Gemma3TextConfig])
def test_models_that_look_ahead_are_refused(kind: type[PretrainedConfig]) -> None:
    assert family_of(kind(**TINY)).blocks == "model.layers"
    with pytest.raises(ConfigurationError, match="use_bidirectional_attention"):
        family_of(kind(**TINY, use_bidirectional_attention=True))


class TestVision:
    """The vision encoder of Gemma 3."""

    CONFIG = CONFIGS["gemma3"]

    def test_it_is_not_read(self, contract: Any) -> None:
        source = SourceModel(contract.save(self.CONFIG))
        assert not [name for name, _ in source._model.named_parameters() if "vision" in name or "modal" in name]
        assert [name for name in source.non_block_names if name.startswith("vision_tower.")]
        source.verify()

    def test_it_is_exported_as_it_is(self, contract: Any) -> None:
        folder = contract.save(self.CONFIG)
        (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
        contract.round_trip_error(self.CONFIG)
        original, exported = Checkpoint(folder), Checkpoint(contract.folder / "exported")
        assert original.names() == exported.names()
        vision = tuple(name for name in original.names() if not name.startswith("language_model."))
        before, after = original.read(vision), exported.read(vision)
        assert all(torch.equal(before[name], after[name]) for name in vision)
        assert len({name.split(".")[0] for name in vision}) == 2
        copied = contract.folder / "exported" / "preprocessor_config.json"
        assert copied.read_text() == '{"do_resize": true}'

    def test_names_of_the_model_itself(self, contract: Any) -> None:
        """Some checkpoints hold the names that the model has in transformers."""
        folder, tokens = contract.save(self.CONFIG), contract.tokens(self.CONFIG)
        tensors = {
            name.replace("language_model.model.", "model.language_model."): tensor
            for name, tensor in Checkpoint(folder)
        }
        expected = SourceModel(folder).embed(tokens)
        save_file(tensors, folder / "model.safetensors")
        source = SourceModel(folder)
        source.verify()
        torch.testing.assert_close(source.embed(tokens), expected)
        assert {name.split(".")[0] for name in source.stored_names(0).values()} == {"model"}
