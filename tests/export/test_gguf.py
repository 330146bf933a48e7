"""GGUF files, read back with the gguf package; what llama.cpp computes from them stands in tests/clients."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport, open_format
from omniquant_pl.export.folded import FoldedModel
from omniquant_pl.export.gguf import GgufExport
from omniquant_pl.export.gguf_blocks import BLOCK_TYPES, exact_type
from omniquant_pl.export.gguf_tokenizer import InexpressibleTokenizerError, read_vocabulary
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import ActivationSpec, RotationSpec, WeightSpec
from tiny_tokenizers import LLAMA3, QWEN2, TEKKEN, TEXTS, byte_level, sentencepiece, split

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

Finish = Callable[[OmniQuantModel], RunFolder]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
FALCON = {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96}


def random_weight(spec: WeightSpec, columns: int, seed: int = 0) -> QuantizedWeight:
    """Three rows of codes from all of their range, with scales from the smallest that there are."""
    generator = torch.Generator().manual_seed(seed)
    size = min(spec.group_size or columns, columns)
    groups, count = -(-columns // size), 2**spec.bits
    scale = (torch.rand(3, groups, generator=generator) * 0.1 + 2**-14).to(getattr(torch, spec.scale_dtype))
    codes = torch.randint(0, count, (3, columns), generator=generator)
    if spec.symmetric:
        return QuantizedWeight((codes - count // 2).to(torch.int8), scale, None, size)
    zero_point = torch.randint(0, count, (3, groups), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes.to(torch.uint8), scale, zero_point, size)


class TestBlocks:
    """Bytes of weights, read with the decoder of the gguf package."""

    @given(
        st.integers(2, 8),
        st.booleans(),
        st.sampled_from([None, 16, 32, 64, 96, 128, 256, 512]),
        st.integers(1, 24).map(lambda n: 32 * n),
        st.sampled_from(["float16", "bfloat16"]),
        st.integers(0, 2**31),
    )
    def test_every_type_that_holds_a_weight_gives_its_values_bit_for_bit(
        self, bits: int, symmetric: bool, group: int | None, columns: int, scale_dtype: Any, seed: int
    ) -> None:
        spec = WeightSpec(bits, group, symmetric, scale_dtype)
        weight = random_weight(spec, columns, seed)
        expected = weight.dequantize().numpy()
        for found in BLOCK_TYPES:
            if found.holds(spec, columns):
                packed = found.pack(weight, spec).numpy()
                values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[found.name])
                assert values.tobytes() == expected.tobytes(), found.name

    @pytest.mark.parametrize("found", BLOCK_TYPES, ids=lambda found: found.name)
    def test_sizes_are_those_of_ggml(self, found: Any) -> None:
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[found.name]] == (found.weights, found.bytes)

    @pytest.mark.parametrize(
        ("scheme", "columns", "name"),
        [
            (WeightSpec(2), 512, "Q2_K"),
            (WeightSpec(2, 256), 512, "Q2_K"),
            (WeightSpec(2), 320, "Q4_0"),
            (WeightSpec(2, 64), 512, "Q4_0"),
            (WeightSpec(3, 128), 512, "Q4_0"),
            (WeightSpec(3, 96), 160, "Q4_0"),  # groups of 96 and 64
            (WeightSpec(3, symmetric=True), 512, "Q3_K"),
            (WeightSpec(4, 128), 512, "Q5_0"),
            (WeightSpec(4), 512, "Q4_K"),
            (WeightSpec(4, 64, symmetric=True), 512, "Q4_0"),
            (WeightSpec(5), 512, "Q5_K"),
            (WeightSpec(6, symmetric=True), 512, "Q6_K"),
            (WeightSpec(6), 512, "Q8_0"),
            (WeightSpec(7, 32), 512, "Q8_0"),
            (WeightSpec(8, symmetric=True), 96, "Q8_0"),
            (WeightSpec(8), 512, None),
            (WeightSpec(4, 48), 480, None),
            (WeightSpec(4), 48, None),
        ],
    )
    def test_smallest_exact_type(self, scheme: WeightSpec, columns: int, name: str | None) -> None:
        found = exact_type(scheme, columns)
        assert (found.name if found else None) == name

    @given(st.integers(2, 8), st.booleans(), st.sampled_from([32, 256]))
    def test_no_smaller_type_has_all_values(self, bits: int, symmetric: bool, group: int) -> None:
        """Counted: values that ``code - zero_point`` takes, and those of ``q - offset`` or of ``q - m``."""
        codes, half = range(2**bits), 2 ** (bits - 1)
        needed = {code - zero for code in codes for zero in ([half] if symmetric else codes)}
        offsets = {"Q3_K": (8, 4), "Q4_0": (16, 8), "Q5_0": (32, 16), "Q6_K": (64, 32), "Q8_0": (256, 128)}
        minima = {"Q2_K": 4, "Q4_K": 16, "Q5_K": 32}
        able = []
        for name, (count, offset) in offsets.items():
            able += [name] * (needed <= {q - offset for q in range(count)})
        able += [name for name, count in minima.items() if len(codes) <= count]
        sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in able}
        bits_of = {name: size / weights for name, (weights, size) in sizes.items() if group % weights == 0}
        found = exact_type(WeightSpec(bits, group, symmetric), 512)
        assert (found.bits_per_weight / 8 if found else None) == min(bits_of.values(), default=None)


def save(config: PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def read(folder: Path, name: str = "model.gguf") -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Values, tensors as float32, and names of their types."""
    reader = gguf.GGUFReader(folder / name)
    values = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return values, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def neighbours(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a LLaMA head as llama.cpp has them: channel i and i + half of it beside each other."""
    size = len(tensor) // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return tensor[order]


class TestFile:
    @pytest.mark.parametrize(
        "weights",
        [
            WeightSpec(2, 32),
            WeightSpec(4, 64, symmetric=True),
            WeightSpec(4),
            WeightSpec(8),
            WeightSpec(3, bits_of={"down_proj": 8}),
        ],
        ids=lambda spec: f"w{spec.bits}",
    )
    def test_weights_are_those_of_the_calibrated_model(
        self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path, weights: WeightSpec
    ) -> None:
        model = OmniQuantModel(str(make_llama(**SIZES, attention_bias=True, mlp_bias=True)), weights)
        run = finish(model)
        HfExport().write(model, run, tmp_path / "hf")
        GgufExport().write(model, run, tmp_path / "gguf")
        expected = {n: t.float().numpy() for n, t in load_file(tmp_path / "hf" / "model.safetensors").items()}
        _, found, types = read(tmp_path / "gguf")
        names = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        pairs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        pairs["lm_head.weight"] = "output.weight"
        for name in expected.keys() - pairs.keys():
            _, _, index, inside = name.split(".", 3)
            module, _, leaf = inside.rpartition(".")
            pairs[name] = f"blk.{index}.{names[module]}.{leaf}"
        assert set(pairs.values()) == set(found)
        for name, own in pairs.items():
            heads = {"attn_q": 4, "attn_k": 2}.get(own.split(".")[-2])
            ordered = expected[name] if heads is None else neighbours(expected[name], heads)
            assert np.array_equal(found[own], ordered), name
        assert (
            types["blk.0.attn_q.weight"]
            == {2: "Q4_0", 3: "Q4_0", 4: "Q4_0" if weights.symmetric else "Q5_0", 8: "F32"}[weights.bits]
        )

    def test_gemma_norms_have_one_added(self, finish: Finish, tmp_path: Path) -> None:
        config = Gemma2Config(**SIZES, **GEMMA2)
        model = OmniQuantModel(str(save(config, tmp_path / "source")), WeightSpec(4, 32))
        GgufExport().write(model, finish(model), tmp_path / "out")
        values, found, _ = read(tmp_path / "out")
        source = load_file(tmp_path / "source" / "model.safetensors")
        norms = {
            "model.norm": "output_norm",
            "model.layers.1.input_layernorm": "blk.1.attn_norm",
            "model.layers.1.post_attention_layernorm": "blk.1.post_attention_norm",
            "model.layers.1.pre_feedforward_layernorm": "blk.1.ffn_norm",
            "model.layers.1.post_feedforward_layernorm": "blk.1.post_ffw_norm",
        }
        for name, own in norms.items():
            assert np.array_equal(found[f"{own}.weight"], (source[f"{name}.weight"] + 1).numpy()), name
        assert "output.weight" not in found  # tied
        assert values["gemma2.attn_logit_softcapping"] == 50
        assert values["gemma2.attention.sliding_window"] == 8

    def test_experts_stand_in_one_tensor(self, finish: Finish, tmp_path: Path) -> None:
        config = MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
        model = OmniQuantModel(str(save(config, tmp_path / "source")), WeightSpec(4, 32))
        run = finish(model)
        GgufExport().write(model, run, tmp_path / "out")
        values, found, types = read(tmp_path / "out")
        weights = FoldedModel(model, run).block(1).weights
        for kind, own in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            name = "model.layers.1.block_sparse_moe.experts.{}." + kind
            expected = torch.stack([weights[name.format(expert)].dequantize() for expert in range(3)])
            assert np.array_equal(found[f"blk.1.ffn_{own}_exps.weight"], expected.numpy())
        assert types["blk.0.ffn_gate_inp.weight"] == "F32"
        assert (values["llama.expert_count"], values["llama.expert_used_count"]) == (3, 2)

    def test_fused_projections_get_another_order(self, finish: Finish, tmp_path: Path) -> None:
        """Falcon: a kv head after the other, each with its query heads; llama.cpp: queries, keys, values."""
        sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")}
        config = FalconConfig(**sizes, **FALCON)
        model = OmniQuantModel(str(save(config, tmp_path / "source")), WeightSpec(4, 32))
        run = finish(model)
        GgufExport().write(model, run, tmp_path / "out")
        _, found, _ = read(tmp_path / "out")
        weights = FoldedModel(model, run).block(0).weights["transformer.h.0.self_attention.query_key_value"]
        grouped = weights.dequantize().view(2, 4, 16, 64)  # kv heads, two queries and key and value, channels
        expected = torch.cat([grouped[:, :2].flatten(0, 2), grouped[:, 2].flatten(0, 1), grouped[:, 3].flatten(0, 1)])
        assert np.array_equal(found["blk.0.attn_qkv.weight"], expected.numpy())

    def test_values_describe_the_model(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        folder = make_llama(
            **SIZES | {"head_dim": 32, "rms_norm_eps": 1e-5},
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        )
        model = OmniQuantModel(str(folder), WeightSpec(4, 32), ActivationSpec(4))
        GgufExport().write(model, finish(model), tmp_path / "out")
        values = read(tmp_path / "out")[0]
        expected = {
            "general.architecture": "llama",
            "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q5_0),
            "llama.context_length": 32,
            "llama.embedding_length": 64,
            "llama.block_count": 2,
            "llama.feed_forward_length": 96,
            "llama.vocab_size": 64,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 32,
            "llama.attention.value_length": 32,
            "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
            "llama.rope.dimension_count": 32,
            "llama.rope.freq_base": 5e5,
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 4,
            "tokenizer.ggml.model": "none",
            "omniquant.weights.bits": 4,
            "omniquant.weights.group_size": 32,
            "omniquant.activations.bits": 4,
        }
        assert {key: values[key] for key in expected} == expected
        card = (tmp_path / "out" / "README.md").read_text()
        assert "5.50 bits a weight" in card
        assert "A program that does not" in card  # quantize activations, as llama.cpp

    def test_half_precision_stays_and_rounds_only_if_asked(
        self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path
    ) -> None:
        folder = make_llama(**SIZES)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
        model = OmniQuantModel(str(tmp_path / "half"), WeightSpec(8))
        run = finish(model)
        GgufExport().write(model, run, tmp_path / "exact")
        GgufExport("float16").write(model, run, tmp_path / "rounded")
        _, exact, types = read(tmp_path / "exact")
        assert (types["token_embd.weight"], types["blk.0.attn_v.weight"]) == ("BF16", "F32")
        _, rounded, types = read(tmp_path / "rounded")
        assert (types["token_embd.weight"], types["blk.0.attn_v.weight"]) == ("F16", "F16")
        assert types["blk.0.attn_norm.weight"] == "F32"
        for name, values in exact.items():
            half = values.astype(np.float16) if values.ndim > 1 else values
            assert np.array_equal(rounded[name], half), name

    def test_tied_head_is_left_out_unless_a_rotation_unties_it(
        self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path
    ) -> None:
        folder = make_llama(**SIZES, tie_word_embeddings=True)
        for name, rotation in {"tied": None, "untied": RotationSpec()}.items():
            model = OmniQuantModel(str(folder), WeightSpec(4, 32), rotation=rotation)
            GgufExport().write(model, finish(model), tmp_path / name)
        assert "output.weight" not in read(tmp_path / "tied")[1]
        assert "output.weight" in read(tmp_path / "untied")[1]

    def test_large_files_are_split(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        model = OmniQuantModel(str(make_llama(**SIZES)), WeightSpec(4, 32))
        run = finish(model)
        GgufExport().write(model, run, tmp_path / "whole")
        GgufExport(shard_bytes=30_000).write(model, run, tmp_path / "parts")
        names = sorted(path.name for path in (tmp_path / "parts").glob("*.gguf"))
        count = len(names)
        assert count > 2
        assert names == [f"model-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
        whole, parts = read(tmp_path / "whole")[1], [read(tmp_path / "parts", name) for name in names]
        merged: dict[str, np.ndarray] = {}
        for number, (values, tensors, _) in enumerate(parts):
            assert (values["split.no"], values["split.count"]) == (number, count)
            assert values["split.tensors.count"] == len(whole)
            assert not merged.keys() & tensors.keys()
            merged |= tensors
        assert merged.keys() == whole.keys()
        assert all(np.array_equal(merged[name], values) for name, values in whole.items())

    def test_a_block_is_read_when_the_one_before_it_is_written(
        self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        block, write = FoldedModel.block, gguf.GGUFWriter.write_tensor_data
        monkeypatch.setattr(FoldedModel, "block", lambda self, i: (events.append(f"read {i}"), block(self, i))[1])
        monkeypatch.setattr(
            gguf.GGUFWriter, "write_tensor_data", lambda self, data: (events.append("written"), write(self, data))[1]
        )
        model = OmniQuantModel(str(make_llama(**SIZES)), WeightSpec(4, 32))
        GgufExport().write(model, finish(model), tmp_path / "out")
        assert events == ["written"] * 3 + ["read 0"] + ["written"] * 9 + ["read 1"] + ["written"] * 9

    def test_llama3_divides_frequencies(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        """Against the frequencies that transformers computes with."""
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        folder = make_llama(**SIZES, rope_parameters=rope)
        model = OmniQuantModel(str(folder), WeightSpec(4, 32))
        GgufExport().write(model, finish(model), tmp_path / "out")
        rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
        plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
        expected = (plain / rotary.inv_freq).numpy()
        assert 1 < expected.max() <= 8
        np.testing.assert_allclose(read(tmp_path / "out")[1]["rope_freqs.weight"], expected, rtol=1e-5)


class TestRefusal:
    def test_a_tokenizer_that_does_not_open(self, make_llama: Callable[..., Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(make_llama(**SIZES), tmp_path / "model"))
        (folder / "tokenizer.json").write_text("{")
        message = "gguf cannot hold .* cannot be opened: tokenizer.json is not JSON .*; formats that can: hf, "
        with pytest.raises(ConfigurationError, match=message):
            open_format("gguf", OmniQuantModel(str(folder), WeightSpec(4, 32)))

    @pytest.mark.parametrize(
        ("config", "weights", "reason"),
        [
            (
                OPTConfig(hidden_size=64, num_hidden_layers=1, ffn_dim=64, num_attention_heads=2, vocab_size=64),
                {},
                "does not know opt",
            ),
            (LlamaConfig(**SIZES, hidden_act="relu"), {}, "no relu activation"),
            (LlamaConfig(**SIZES), {"group_size": 20}, "groups of 20"),
            (
                LlamaConfig(**SIZES | {"intermediate_size": 80}),
                {"group_size": None},
                "model.layers.0.mlp.down_proj: its rows",
            ),
            (LlamaConfig(**SIZES), {"scale_dtype": "float32"}, "scales in float16"),
            (Gemma2Config(**SIZES, **GEMMA2 | {"query_pre_attn_scalar": 20}), {}, "scales queries by 32"),
            (Gemma2Config(**SIZES, **GEMMA2, layer_types=["full_attention"] * 2), {}, "one of 2 layers"),
            (Gemma2Config(**SIZES, **GEMMA2, tie_word_embeddings=False), {}, "embedding as the head"),
            (
                Gemma2Config(**SIZES, **GEMMA2, attention_bias=True),
                {},
                "no place for model.layers.0.self_attn.o_proj.bias",
            ),
            (
                Qwen2MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=2, decoder_sparse_step=2),
                {},
                "experts in every layer",
            ),
            (Qwen2MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=2, norm_topk_prob=True), {}, "norm_topk_prob"),
            (
                FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, alibi=True),
                {},
                "rotary",
            ),
        ],
        ids=str,
    )
    def test_reason(self, tmp_path: Path, config: PretrainedConfig, weights: dict[str, Any], reason: str) -> None:
        spec = replace(WeightSpec(4, 32), **weights)
        model = OmniQuantModel(str(save(config, tmp_path / "source")), spec)
        found = GgufExport().refusal(model)
        assert found is not None
        assert reason in found

    def test_without_the_package(self, make_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
        with pytest.raises(ConfigurationError, match=r"pip install 'omniquant-pl\[gguf\]'"):
            open_format("gguf", OmniQuantModel(str(make_llama(**SIZES)), WeightSpec(4, 32)))

    def test_scale_beyond_float16(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        source = make_llama(**SIZES)
        large = AutoModelForCausalLM.from_pretrained(source)
        large.model.layers[1].mlp.up_proj.weight.data *= 1e8
        large.save_pretrained(tmp_path / "source")
        model = OmniQuantModel(str(tmp_path / "source"), WeightSpec(4, 32, scale_dtype="bfloat16"))
        with pytest.raises(
            ConfigurationError,
            match=r"a scale of model\.layers\.1\.mlp\.up_proj\.weight has the value .*, beyond float16",
        ):
            GgufExport().write(model, finish(model), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def wrapped(model: models.Model) -> PreTrainedTokenizerBase:
    """A tokenizer that is nothing but its model."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


class TestTokenizer:
    @pytest.mark.parametrize(
        ("tokenizer", "name"),
        [
            (byte_level(), "gpt-2"),
            (byte_level(split(QWEN2)), "qwen2"),
            (byte_level(split(LLAMA3), ignore_merges=True), "llama-bpe"),
            (byte_level(split(LLAMA3)), "dbrx"),
            (byte_level(split(TEKKEN), ignore_merges=True), "tekken"),
            (byte_level(split(TEKKEN)), "tekken"),  # merges make every token anyway
            (
                byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
                "smollm",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_byte_level(self, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
        vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 2)
        assert (vocabulary.model, vocabulary.settings["ggml.pre"]) == ("gpt2", name)
        last = len(tokenizer) - 1
        ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        assert ids == tokenizer.get_vocab() | {f"[PAD{i}]": i for i in (last + 1, last + 2)}
        kinds = gguf.TokenType
        expected = {
            "<s>": kinds.CONTROL,
            "<tool>": kinds.USER_DEFINED,
            "a": kinds.NORMAL,
            f"[PAD{last + 1}]": kinds.UNUSED,
        }
        assert {token: vocabulary.types[ids[token]] for token in expected} == expected
        assert vocabulary.settings["ggml.bos_token_id"] == tokenizer.bos_token_id
        assert not vocabulary.settings["ggml.add_bos_token"]
        state = tokenizer.backend_tokenizer
        rebuilt = Tokenizer(models.BPE(tokenizer.get_vocab(), [tuple(m.split(" ")) for m in vocabulary.merges]))
        rebuilt.pre_tokenizer = state.pre_tokenizer
        for text in TEXTS:
            assert rebuilt.encode(text).ids == state.encode(text, add_special_tokens=False).ids

    @pytest.mark.parametrize("style", ["legacy", "metaspace", "gemma"])
    def test_sentencepiece(self, style: str) -> None:
        """Pieces joined by their scores, as SentencePiece does, are the tokens that merges make."""
        tokenizer = sentencepiece(style)
        vocabulary = read_vocabulary(tokenizer, len(tokenizer))
        assert vocabulary.model == "llama"
        assert vocabulary.settings["ggml.add_space_prefix"] is (style != "gemma")
        assert vocabulary.settings["ggml.add_bos_token"] is True
        ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        kinds = gguf.TokenType
        expected = {"<unk>": kinds.UNKNOWN, "<0x0A>": kinds.BYTE, "</s>": kinds.CONTROL, "▁the": kinds.NORMAL}
        assert {token: vocabulary.types[ids[token]] for token in expected} == expected
        for text in TEXTS:
            stripped = text.strip()
            found = [ids["<s>"], *_joined(stripped, vocabulary.scores, ids, prefix=style != "gemma")]
            assert found == tokenizer(stripped)["input_ids"]

    def test_chat_template_and_file(self, make_llama: Callable[..., Path], finish: Finish, tmp_path: Path) -> None:
        tokenizer = byte_level(adds_bos=True)
        tokenizer.chat_template = "{{ messages }}"
        folder = make_llama(**SIZES | {"vocab_size": len(tokenizer)})
        tokenizer.save_pretrained(folder)
        model = OmniQuantModel(str(folder), WeightSpec(4, 32))
        GgufExport().write(model, finish(model), tmp_path / "out")
        values = read(tmp_path / "out")[0]
        assert values["tokenizer.chat_template"] == "{{ messages }}"
        assert values["tokenizer.ggml.add_bos_token"] is True
        assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        assert len(values["tokenizer.ggml.tokens"]) == len(tokenizer)
        assert (tmp_path / "out" / "tokenizer.json").is_file()

    @pytest.mark.parametrize(
        ("tokenizer", "reason"),
        [
            (byte_level(pre_tokenizers.ByteLevel(True)), "space in front"),
            (byte_level(split(r"\p{L}+|\P{L}")), "no name for"),
            (wrapped(models.WordPiece({"a": 0}, unk_token="a")), "WordPiece"),
            (wrapped(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")), "marks parts of words"),
        ],
        ids=["prefix", "expression", "type", "suffix"],
    )
    def test_inexpressible(self, tokenizer: PreTrainedTokenizerBase, reason: str) -> None:
        with pytest.raises(InexpressibleTokenizerError, match=reason):
            read_vocabulary(tokenizer, 1000)

    def test_smaller_embedding(self) -> None:
        with pytest.raises(InexpressibleTokenizerError, match="embedding of 20"):
            read_vocabulary(byte_level(), 20)

    def test_model_is_refused(self, make_llama: Callable[..., Path], tmp_path: Path) -> None:
        folder = make_llama(**SIZES | {"vocab_size": 600})
        byte_level(split(r"\p{L}+|\P{L}")).save_pretrained(folder)
        reason = GgufExport().refusal(OmniQuantModel(str(folder), WeightSpec(4, 32)))
        assert reason is not None
        assert "nothing like the tokenizer" in reason


def _joined(text: str, scores: Any, ids: dict[str, int], prefix: bool) -> list[int]:
    """SentencePiece's BPE, slowly: the best pair of neighbours is joined until none is a piece; the rest are bytes."""
    symbols = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_a_tokenizer_that_transformers_makes_up_is_none() -> None:
    assert read_vocabulary(wrapped(models.BPE()), 10).model == "none"
    assert read_vocabulary(None, 10).tokens == ()
