"""Configurations that make no model: one line that names the file, whatever transformers raises."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.cli.program import main
from omniquant_pl.errors import ConfigurationError

ABSENT = "absent"


def change(folder: Path, **changes: Any) -> Path:
    """Changes config.json; ``text_config__hidden_size`` is inside a section."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[leaf] = value
        if value is ABSENT:
            del place[leaf]
    path.write_text(json.dumps(content))
    return folder


def message_of(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        SourceModel(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


ROPE = {"rope_parameters": ABSENT}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # what transformers' configuration refuses
    "text-for-a-number": ({"num_hidden_layers": "1"}, "'num_hidden_layers' expected int, got str"),
    "null-for-a-number": ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
    "fraction": ({"num_hidden_layers": 1.5}, "'num_hidden_layers' expected int, got float"),
    "head-dim-is-text": ({"head_dim": "16"}, "'head_dim' with value '16'"),
    "vocabulary-is-null": ({"vocab_size": None}, "'vocab_size' expected int"),
    "positions-are-null": ({"max_position_embeddings": None}, "'max_position_embeddings' expected int"),
    "flag-is-text": ({"attention_bias": "yes"}, "'attention_bias' expected bool"),
    "tie-is-null": ({"tie_word_embeddings": None}, "'tie_word_embeddings' expected bool"),
    "heads-do-not-divide": ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple"),
    "no-heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "odd-rotary": ({"head_dim": 15}, "even rotary dimension"),
    "layer-types": ({"layer_types": ["full_attention"] * 3}, r"`layer_types` \(3\)"),
    "rope-without-factor": (ROPE | {"rope_scaling": {"type": "linear"}}, "Missing required keys in .*'factor'"),
    "rope-is-a-list": (ROPE | {"rope_scaling": ["linear", 2]}, "'rope_parameters' with value"),
    "rope-is-text": (ROPE | {"rope_scaling": "linear"}, "'rope_parameters' with value 'linear'"),
    "labels": ({"num_labels": "x"}, "TypeError"),
    "auto-map": ({"auto_map": 3}, "TypeError"),
    # what building the model runs into
    "pad-token": ({"pad_token_id": 64}, "pad_token_id is not a token below vocab_size"),
    "unknown-rope": (ROPE | {"rope_scaling": {"type": "foo", "factor": 2.0}}, r"rope_scaling\.type is 'foo'"),
    "rope-factor-is-text": (ROPE | {"rope_scaling": {"type": "linear", "factor": "2"}}, "TypeError"),
    "rope-theta-is-null": (ROPE | {"rope_theta": None}, "TypeError"),
    "activation": ({"hidden_act": "foo"}, "hidden_act is 'foo', which transformers does not know"),
    "negative-size": ({"hidden_size": -64}, "negative dimension"),
    "negative-heads": ({"num_attention_heads": -4}, "negative dimension"),
    "no-kv-heads": ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    # what only running it would
    "no-blocks": ({"num_hidden_layers": 0}, "num_hidden_layers is not above 0"),
    "no-positions": ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "tuples": ({"return_dict": False}, "has no attribute 'last_hidden_state'"),
    # what nobody else says in the file's words
    "dtype-auto": ({"torch_dtype": "auto"}, "torch_dtype is 'auto'; it is one of float32"),
    "dtype-unknown": ({"dtype": "bf16"}, "dtype is 'bf16'; it is one of float32"),
    "dtype-of-codes": ({"dtype": "int8"}, "dtype is 'int8'"),
    "dtype-is-a-list": ({"dtype": ["float16"]}, r"dtype is \['float16'\]"),
    "no-family": ({"model_type": ABSENT}, "has no model_type"),
    "family-is-null": ({"model_type": None}, "has no model_type"),
    "family-is-a-list": ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
    "unknown-family": ({"model_type": "nothing"}, "the family 'nothing' is not supported; known: .*llama"),
    "architectures": ({"architectures": [3]}, r"architectures is \[3\], not a list of class names"),
    "quantization-is-a-list": ({"quantization_config": []}, r"quantization_config is \[\]"),
    "quantization-is-text": ({"quantization_config": "gptq"}, "quantization_config is 'gptq'"),
    "quantization-is-empty": ({"quantization_config": {}}, r"quantization_config is \{\}"),
    "text-config-is-a-number": ({"text_config": 3}, "'int' object has no attribute"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line(make_llama: Callable[..., Path], case: str) -> None:
    changes, expected = REFUSED[case]
    folder = change(make_llama(), **changes)
    message = message_of(folder)
    assert message.startswith(f"model.path: {folder / 'config.json'}: ")
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": None},
        {"num_key_value_heads": None},
        {"dtype": None},
        {"dtype": "float64"},
        {"architectures": None},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"quantization_config": None},
        {"auto_map": {"AutoConfig": "no_such_file.Config"}},
        {"output_hidden_states": True},
    ],
    ids=str,
)
def test_what_transformers_loads_opens(
    make_llama: Callable[..., Path], logits_of: Callable[..., Tensor], tokens: Tensor, changes: dict[str, Any]
) -> None:
    folder = change(make_llama(), **changes)
    logits_of(folder, tokens)
    assert "quantization_config" not in SourceModel(folder).config_json


TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
GEMMA3 = TINY | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 32}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS: dict[str, Any] = TINY | SPECIAL | {"num_key_value_heads": 2, "num_experts_per_tok": 1}
FAMILIES: dict[str, PretrainedConfig] = {
    "falcon": FalconConfig(**TINY),
    "gemma3": Gemma3Config(
        text_config=GEMMA3,
        vision_config=VISION | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=63,
    ),
    "mixtral": MixtralConfig(**EXPERTS, intermediate_size=48, num_local_experts=2),
    "opt": OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=32),
    "phi3": Phi3Config(**TINY, **SPECIAL, intermediate_size=48),
    "qwen2_moe": Qwen2MoeConfig(
        **EXPERTS, num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, intermediate_size=48
    ),
}
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", {"num_attention_heads": 3}, "head"),
    ("falcon", {"alibi": "x"}, "'alibi' expected bool"),
    ("gemma3", {"text_config": 3}, "config.json"),
    ("gemma3", {"text_config__hidden_size": None}, "'hidden_size' expected int"),
    ("gemma3", {"text_config__layer_types": ["full_attention"] * 2}, "layer_types"),
    ("gemma3", {"text_config__rope_parameters__sliding_attention": {"rope_type": "foo"}}, "foo"),
    ("gemma3", {"vision_config": "x"}, "config.json"),
    ("gemma3", {"text_config__quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
    ("mixtral", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3, of 2 experts"),
    ("mixtral", {"num_local_experts": 0}, "0 experts"),
    ("opt", {"activation_function": "foo"}, "activation_function is 'foo'"),
    ("opt", {"num_attention_heads": -1}, "no heads"),
    ("opt", {"ffn_dim": None}, "'ffn_dim' expected int"),
    ("phi3", {"partial_rotary_factor": "x", "rope_parameters": ABSENT}, "config.json"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "long_factor"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "ZeroDivisionError"),
    ("qwen2_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, of 2 experts"),
]


@pytest.mark.parametrize(("family", "changes", "expected"), OTHERS, ids=str)
def test_other_families(tmp_path: Path, family: str, changes: dict[str, Any], expected: str) -> None:
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    SourceModel(tmp_path)
    assert expected in message_of(change(tmp_path, **changes))


@pytest.mark.parametrize(
    "content", ["{", "", "[]", "3", "null", '"llama"', "[" * 100_000, "\ufeff{}"], ids=lambda c: c[:8]
)
def test_a_file_that_is_no_object(make_llama: Callable[..., Path], content: str) -> None:
    folder = make_llama()
    (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in message_of(folder)


@pytest.mark.parametrize(
    "changes", [{"pad_token_id": 64}, {"torch_dtype": "auto"}, {"num_attention_heads": 0}], ids=str
)
def test_the_program_ends_with_one_line_and_code_2(
    make_llama: Callable[..., Path],
    token_files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    folder = change(make_llama(), **changes)
    options = {"model.path": folder, "data.dataset": token_files[0], "trainer.default_root_dir": tmp_path / "run"}
    flags = [f"--{key}={value}" for key, value in options.items()]
    monkeypatch.setattr("sys.argv", ["omniquant", "fit", "--config=w4a16.yaml", *flags])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: model.path: {folder / 'config.json'}: ")


class TestArchitectures:
    @pytest.mark.parametrize(
        "name",
        [
            "LlamaForSequenceClassification",
            "LlamaForTokenClassification",
            "LlamaForQuestionAnswering",
            "LlamaForRewardModel",
            "LlamaRewardModel",
            "LlamaBiModel",
            "LlamaForCausalLMEagle3",
        ],
    )
    def test_another_head_is_refused(self, make_llama: Callable[..., Path], name: str) -> None:
        message = message_of(change(make_llama(tie_word_embeddings=True), architectures=[name]))
        assert f"{name} is no causal language model; give a checkpoint whose architectures end in" in message

    def test_a_classifier_as_it_is_saved(self, tmp_path: Path) -> None:
        """Tied, it would load: its embedding would be taken for the head that it does not have."""
        config = LlamaConfig(**TINY, intermediate_size=48, tie_word_embeddings=True)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path)
        assert "LlamaForSequenceClassification is no causal language model" in message_of(tmp_path)

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM", "InternLM3ForCausalLM", "LlamaModel"])
    def test_a_language_model_is_not(self, make_llama: Callable[..., Path], name: str) -> None:
        SourceModel(change(make_llama(), architectures=[name]))

    def test_without_a_head_the_head_is_missed(self, tmp_path: Path) -> None:
        """transformers would draw one at random."""
        LlamaModel(LlamaConfig(**TINY, intermediate_size=48)).save_pretrained(tmp_path)
        assert "has no tensor lm_head.weight" in message_of(tmp_path)
