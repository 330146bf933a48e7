"""Folders for MLC-LLM, read back by a slow decoder of what its sources say; MLC-LLM itself was not run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport
from omniquant_pl.export.mlc import MlcExport
from omniquant_pl.export.mlc_codes import pack_codes, weight_refusal
from omniquant_pl.export.verification import Verification
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import RotationSpec, WeightSpec
from tiny_tokenizers import byte_level, sentencepiece

Finish = Callable[[OmniQuantModel], RunFolder]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,  # not a multiple of 32
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def decode(words: np.ndarray, scale: np.ndarray, columns: int) -> np.ndarray:
    """Weights of words ``[out, words]`` and scales ``[out, groups]``: eight codes a word, 32 a scale."""
    values = np.zeros((len(words), columns), np.float64)
    for row in range(len(words)):
        for column in range(columns):
            code = (int(words[row, column // 8]) >> (4 * (column % 8))) & 15
            values[row, column] = (code - 7) * float(scale[row, column // 32])
    return values


def read(folder: Path, name: str = "tensor-cache.json") -> dict[str, np.ndarray]:
    """Tensors by name, from the list of shards, whose checksums and sizes are checked."""
    content = json.loads((folder / name).read_text())
    tensors: dict[str, np.ndarray] = {}
    for shard in content["records"]:
        data = (folder / shard["dataPath"]).read_bytes()
        assert shard["format"] == "raw-shard"
        assert shard["nbytes"] == len(data)
        assert shard["md5sum"] == hashlib.md5(data).hexdigest()
        end = 0
        for record in shard["records"]:
            assert record["byteOffset"] == end
            end += record["nbytes"]
            values = np.frombuffer(data[record["byteOffset"] : end], record["dtype"]).reshape(record["shape"])
            assert record["name"] not in tensors
            tensors[record["name"]] = values
        assert end == len(data)
    assert content["metadata"]["ParamSize"] == len(tensors)
    assert content["metadata"]["ParamBytes"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


class TestCodes:
    @given(
        st.sampled_from([(2, False), (3, False), (2, True), (3, True), (4, True)]),
        st.sampled_from([None, 32, 64, 96]),
        st.integers(1, 130),
        st.integers(0, 2**31),
    )
    def test_values_are_ours(self, kind: tuple[int, bool], group: int | None, columns: int, seed: int) -> None:
        (bits, symmetric), generator = kind, torch.Generator().manual_seed(seed)
        size, count = min(group or columns, columns), 2**bits
        groups = -(-columns // size)
        scale = (torch.rand(2, groups, generator=generator) + 2**-14).half()
        codes = torch.randint(0, count, (2, columns), generator=generator)
        zero_point = torch.randint(0, count, (2, groups), generator=generator).to(torch.uint8)
        weight = QuantizedWeight(codes.to(torch.uint8), scale, zero_point, size)
        if symmetric:
            weight = QuantizedWeight((codes - count // 2).to(torch.int8), scale, None, size)
        spec = WeightSpec(bits, group, symmetric)
        assert weight_refusal(spec, (2, columns)) is None
        words, scales = pack_codes(weight, spec)
        assert (words.shape, scales.shape) == ((2, 4 * -(-columns // 32)), (2, -(-columns // 32)))
        found = decode(words.numpy().view(np.uint32), scales.numpy(), columns)
        assert np.array_equal(found, weight.dequantize().numpy())

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            (WeightSpec(4), "codes with zero points of 4 bit"),
            (WeightSpec(5, symmetric=True), "symmetric codes of 5 bit"),
            (WeightSpec(3, 48), "groups of 48"),
            (WeightSpec(3, scale_dtype="float32"), "float16"),
        ],
    )
    def test_refusal(self, spec: WeightSpec, reason: str) -> None:
        assert reason in (weight_refusal(spec, (2, 128)) or "")

    def test_a_group_that_is_as_long_as_the_row_needs_no_multiple(self) -> None:
        assert weight_refusal(WeightSpec(3, 48), (2, 48)) is None


def save(config: PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.half().save_pretrained(folder)
    return folder


def unfused(found: dict[str, np.ndarray], columns_of: dict[str, int]) -> dict[str, Tensor]:
    """Decodes every linear and takes the fused ones apart, back to transformers' names."""
    tensors: dict[str, Tensor] = {}
    for name, values in found.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "q_scale":
            continue
        if leaf == "q_weight":
            values = decode(values, found[f"{module}.q_scale"], columns_of[module.rpartition(".")[2]])
            leaf = "weight"
        prefix, _, kind = module.rpartition(".")
        if kind in ("qkv_proj", "c_attn"):
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), np.split(values, [64, 96]), strict=True))
        elif kind == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(values, 2), strict=True))
        else:
            parts = {kind: values}
        tensors |= {f"{prefix}.{part}.{leaf}".lstrip("."): torch.tensor(each).float() for part, each in parts.items()}
    return tensors


FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3, biases": Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_calibrated_model(finish: Finish, tmp_path: Path, family: str) -> None:
    model = OmniQuantModel(str(save(FAMILIES[family], tmp_path / "source")), WeightSpec(4, 64, symmetric=True))
    run = finish(model)
    HfExport().write(model, run, tmp_path / "hf")
    MlcExport().write(model, run, tmp_path / "mlc")
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    names = {"qkv_proj", "c_attn", "gate_up_proj", "o_proj"}
    found = unfused(read(tmp_path / "mlc"), dict.fromkeys(names, 64) | {"down_proj": 80})
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_other_schemes(make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
    specs = [WeightSpec(2, 32), WeightSpec(3), WeightSpec(3, symmetric=True, bits_of={"down_proj": 4})]
    for number, spec in enumerate(specs):
        model = OmniQuantModel(str(make_llama(**SIZES)), spec)
        run = finish(model)
        HfExport().write(model, run, tmp_path / f"hf-{number}")
        MlcExport().write(model, run, tmp_path / f"mlc-{number}")
        found = read(tmp_path / f"mlc-{number}")
        expected = load_file(tmp_path / f"hf-{number}" / "model.safetensors")
        layer = "model.layers.1.mlp.down_proj"
        decoded = decode(found[f"{layer}.q_weight"], found[f"{layer}.q_scale"], 80)
        assert np.array_equal(decoded, expected[f"{layer}.weight"].numpy())


def test_shards(make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
    model = OmniQuantModel(str(make_llama(**SIZES)), WeightSpec(3))
    run = finish(model)
    MlcExport().write(model, run, tmp_path / "whole")
    MlcExport(shard_bytes=6_000).write(model, run, tmp_path / "parts")
    files = list((tmp_path / "parts").glob("params_shard_*.bin"))
    assert len(files) > 3
    assert len(list((tmp_path / "whole").glob("*.bin"))) == 1
    whole, parts, older = (
        read(tmp_path / "whole"),
        read(tmp_path / "parts"),
        read(tmp_path / "parts", "ndarray-cache.json"),
    )
    assert whole.keys() == parts.keys() == older.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    largest = max(tensor.nbytes for tensor in whole.values())
    assert max(file.stat().st_size for file in files) <= max(6_000, largest)


class TestConfig:
    def config(self, source: Path, finish: Finish, folder: Path) -> dict[str, Any]:
        model = OmniQuantModel(str(source), WeightSpec(3))
        MlcExport().write(model, finish(model), folder)
        return dict(json.loads((folder / "mlc-chat-config.json").read_text()))

    def test_llama(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        tokenizer = byte_level(adds_bos=True)
        source = make_llama(
            **SIZES | {"vocab_size": len(tokenizer) + 1},
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        tokenizer.save_pretrained(source)
        config = self.config(source, finish, tmp_path / "out")
        expected = {
            "model_type": "llama",
            "quantization": "q4f16_2",
            "vocab_size": len(tokenizer) + 1,
            "active_vocab_size": len(tokenizer),
            "context_window_size": 32,
            "sliding_window_size": -1,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tokenizer_files": ["tokenizer.json", "tokenizer_config.json"],
            "tokenizer_info": {
                "token_postproc_method": "byte_level",
                "prepend_space_in_encode": False,
                "strip_space_in_decode": False,
            },
        }
        assert {key: config[key] for key in expected} == expected
        sizes = {key: SIZES[key] for key in ("hidden_size", "num_key_value_heads", "intermediate_size")}
        assert config["model_config"].items() >= sizes.items()
        assert config["model_config"]["position_embedding_base"] == 5e5
        assert config["model_config"]["tie_word_embeddings"] is True
        assert config["conv_template"]["stop_token_ids"] == [tokenizer.eos_token_id]
        assert not any(name.startswith("lm_head") for name in read(tmp_path / "out"))
        assert "mlc_llm compile" in (tmp_path / "out" / "README.md").read_text()

    def test_sentencepiece(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        tokenizer = sentencepiece()
        source = make_llama(**SIZES | {"vocab_size": len(tokenizer)})
        tokenizer.save_pretrained(source)
        info = self.config(source, finish, tmp_path / "out")["tokenizer_info"]
        assert info["token_postproc_method"] == "byte_fallback"
        assert info["prepend_space_in_encode"] is True

    def test_mistral_window(self, finish: Finish, tmp_path: Path) -> None:
        source = save(MistralConfig(**SIZES, sliding_window=16), tmp_path / "source")
        config = self.config(source, finish, tmp_path / "out")
        assert (config["context_window_size"], config["sliding_window_size"]) == (-1, 16)
        assert config["prefill_chunk_size"] == 16


class TestRefusal:
    def test_a_tokenizer_that_does_not_open(self, make_llama: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(make_llama(**SIZES), tmp_path / "model"))
        (folder / "tokenizer.json").write_text("{")
        reason = MlcExport().refusal(OmniQuantModel(str(folder), WeightSpec(4, 32, symmetric=True)))
        assert reason is not None
        assert "cannot be opened: tokenizer.json is not JSON" in reason

    @pytest.mark.parametrize(
        ("config", "spec", "reason"),
        [
            (
                OPTConfig(hidden_size=64, num_hidden_layers=1, ffn_dim=64, num_attention_heads=2),
                WeightSpec(3),
                "not opt",
            ),
            (LlamaConfig(**SIZES, attention_bias=True), WeightSpec(3), "no biases"),
            (LlamaConfig(**SIZES, hidden_act="gelu"), WeightSpec(3), "no gelu"),
            (MistralConfig(**SIZES, tie_word_embeddings=True), WeightSpec(3), "head of its own"),
            (
                Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0),
                WeightSpec(3),
                "window",
            ),
            (
                Qwen2Config(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
                WeightSpec(3),
                "linear",
            ),
            (LlamaConfig(**SIZES), WeightSpec(4, 32), "model.layers.0.self_attn.q_proj: codes with zero points"),
        ],
        ids=["family", "biases", "activation", "tied", "window", "rotary", "codes"],
    )
    def test_reason(self, tmp_path: Path, config: PretrainedConfig, spec: WeightSpec, reason: str) -> None:
        found = MlcExport().refusal(OmniQuantModel(str(save(config, tmp_path / "source")), spec))
        assert found is not None
        assert reason in found

    def test_dtype(self, make_llama: Callable[..., Path]) -> None:
        model = OmniQuantModel(str(make_llama(**SIZES)), WeightSpec(3))
        assert MlcExport("float16").refusal(model) is None
        assert "no bfloat16" in (MlcExport("bfloat16").refusal(model) or "")

    def test_values_beyond_float16(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        large = AutoModelForCausalLM.from_pretrained(make_llama(**SIZES))
        large.model.norm.weight.data *= 1e6
        large.save_pretrained(tmp_path / "source")
        model = OmniQuantModel(str(tmp_path / "source"), WeightSpec(3))
        with pytest.raises(
            ConfigurationError, match=r"model\.norm\.weight has the value .* 65504\), and mlc has nothing wider"
        ):
            MlcExport().write(model, finish(model), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_verification_says_what_is_missing(self) -> None:
        with pytest.raises(ConfigurationError, match="mlc_llm"):
            Verification(MlcExport(), torch.zeros(1, 2, dtype=torch.long))


def test_rotation_unties_the_head(make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
    model = OmniQuantModel(str(make_llama(**SIZES, tie_word_embeddings=True)), WeightSpec(3), rotation=RotationSpec())
    MlcExport().write(model, finish(model), tmp_path / "out")
    assert "lm_head.weight" in read(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert config["model_config"]["tie_word_embeddings"] is False
