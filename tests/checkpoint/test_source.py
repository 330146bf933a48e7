"""Blocks run one by one give transformers' own logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaForCausalLM

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.transform import AttentionShape

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "wide-heads": {"head_dim": 16, "num_key_value_heads": 2},
    "shards": {"max_shard_size": "20KB", "num_hidden_layers": 3},
}


def block_by_block(source: SourceModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = source.embed(tokens)
    for index, call in enumerate(source.calls(tokens.shape[1])):
        hidden = call(source.make_block(index, source.block_tensors(index)), hidden)
    return source.logits(hidden)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(
    make_llama: Callable[..., Path],
    logits_of: Callable[..., torch.Tensor],
    tokens: torch.Tensor,
    variant: str,
) -> None:
    folder = make_llama(**VARIANTS[variant])
    torch.testing.assert_close(
        block_by_block(SourceModel(folder), tokens), logits_of(folder, tokens), rtol=0, atol=1e-6
    )


def test_the_variants_differ(
    make_llama: Callable[..., Path], logits_of: Callable[..., torch.Tensor], tokens: torch.Tensor
) -> None:
    """The rope scaling would otherwise not be tested at all."""
    plain, scaled = make_llama(), make_llama(rope_parameters=LLAMA3_ROPE)
    assert (logits_of(plain, tokens) - logits_of(scaled, tokens)).abs().max() > 1e-2


def test_other_lengths(llama: Path, logits_of: Callable[..., torch.Tensor], tokens: torch.Tensor) -> None:
    source = SourceModel(llama)
    for length in (16, 5, 1):
        shorter = tokens[:, :length]
        torch.testing.assert_close(block_by_block(source, shorter), logits_of(llama, shorter), rtol=0, atol=1e-6)


def test_half_precision_checkpoint(
    llama: Path, logits_of: Callable[..., torch.Tensor], tokens: torch.Tensor, tmp_path: Path
) -> None:
    LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = SourceModel(tmp_path)
    stored = source.checkpoint.read(("model.norm.weight",))["model.norm.weight"]
    assert stored.dtype == torch.bfloat16
    torch.testing.assert_close(block_by_block(source, tokens), logits_of(tmp_path, tokens), rtol=0, atol=1e-6)


def test_checkpoint_without_the_head(
    make_llama: Callable[..., Path],
    logits_of: Callable[..., torch.Tensor],
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Saved from the model under the head, names have no ``model.`` in front."""
    folder = make_llama(tie_word_embeddings=True)
    LlamaForCausalLM.from_pretrained(folder).model.save_pretrained(tmp_path)
    source = SourceModel(tmp_path)
    assert "layers.0.self_attn.q_proj.weight" in source.checkpoint
    torch.testing.assert_close(block_by_block(source, tokens), logits_of(folder, tokens), rtol=0, atol=1e-6)


def test_names_of_all_tensors(make_llama: Callable[..., Path]) -> None:
    folder = make_llama(num_key_value_heads=2, attention_bias=True)
    source, stored = SourceModel(folder), load_file(folder / "model.safetensors")
    inside = [name for index in range(2) for name in source.stored_names(index).values()]
    assert sorted([*inside, *source.non_block_names]) == sorted(stored)
    assert source.non_block_names == (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    )
    prefix = "model.layers.0."
    assert source.block_shapes(0) == {
        name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in stored.items() if name.startswith(prefix)
    }


def test_blocks_do_not_share_tensors(llama: Path) -> None:
    source = SourceModel(llama)
    first, second = (source.block_tensors(index) for index in range(2))
    assert not any(torch.equal(first[name], second[name]) for name in first)
    block = source.make_block(1, second)
    assert all(torch.equal(block.state_dict()[name], second[name]) for name in second)


def test_what_the_configuration_says(make_llama: Callable[..., Path]) -> None:
    source = SourceModel(make_llama(num_key_value_heads=2, num_hidden_layers=3))
    assert len(source) == 3
    assert source.positions == 32
    assert source.tokenizer is None
    assert source.attention == AttentionShape(heads=4, kv_heads=2, head_dim=8)


class TestRefused:
    @pytest.fixture
    def copy(self, llama: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(llama, tmp_path / "copy"))

    def test_no_configuration(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(ConfigurationError, match=r"model\.path: .*config\.json"):
            SourceModel(copy)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-family"}'])
    def test_configuration_that_is_none(self, copy: Path, content: str) -> None:
        (copy / "config.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"model\.path: .*config\.json"):
            SourceModel(copy)

    def test_family_that_nobody_registered(self, tmp_path: Path) -> None:
        GPT2Config().save_pretrained(tmp_path)
        with pytest.raises(ConfigurationError, match=r"model\.path: .*'gpt2'.* known: .*llama"):
            SourceModel(tmp_path)

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_shape_that_does_not_fit(self, copy: Path, name: str) -> None:
        self._change(copy, name, lambda tensor: tensor[:, :-1].contiguous())
        with pytest.raises(ConfigurationError, match=r"model\.path: .* has shape .* not ") as caught:
            self._use(copy)
        assert name in str(caught.value)

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_missing_tensor(self, copy: Path, name: str) -> None:
        self._change(copy, name, lambda _: None)
        with pytest.raises(ConfigurationError, match=r"model\.path: .* has no tensor") as caught:
            self._use(copy)
        assert name in str(caught.value)

    @staticmethod
    def _use(folder: Path) -> None:
        source = SourceModel(folder)
        for index in range(len(source)):
            source.make_block(index, source.block_tensors(index))

    @staticmethod
    def _change(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_that_is_quantized_already_is_refused(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="is quantized already"):
        SourceModel(folder)


CODES = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "BOOL": torch.bool}


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"],
)
def test_codes_are_not_taken_for_weights(make_llama: Callable[..., Path], name: str, dtype: str) -> None:
    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(CODES[dtype])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigurationError, match=rf"{name} is stored as {dtype}; give the original checkpoint"):
        SourceModel(folder).verify()


def test_what_is_only_exported_is_looked_at_too(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    others = {"vision.position_ids": torch.arange(4), "vision.weight": torch.zeros(2, 2)}
    save_file(tensors | others, folder / "model.safetensors")
    SourceModel(folder).verify()
    others["vision.weight"] = others["vision.weight"].to(torch.int8)
    save_file(tensors | others, folder / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"vision\.weight is stored as I8"):
        SourceModel(folder).verify()


class TestFloat64:
    """Computed in float32, as everything, and as transformers does when it is told to."""

    @pytest.fixture
    def folder(self, make_llama: Callable[..., Path]) -> Path:
        folder = make_llama(vocab_size=61)
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).save_pretrained(folder)
        return folder

    def test_opens(self, folder: Path, logits_of: Callable[..., torch.Tensor], tokens: torch.Tensor) -> None:
        source, tokens = SourceModel(folder), tokens % 61
        source.verify()
        assert source.describe("lm_head.weight").dtype == "F64"
        torch.testing.assert_close(block_by_block(source, tokens), logits_of(folder, tokens), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_values_that_float32_does_not_hold(self, folder: Path, name: str) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[2] = 1e200
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ConfigurationError, match=f"1 values of {name} are NaN or infinite"):
            SourceModel(folder).verify()
