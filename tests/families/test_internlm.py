"""InternLM 1, 2 and 3: a LLaMA whose tensors and configuration are rewritten as InternLM's code has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, dynamic_module_utils

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import registered_families

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 8, 2, 4
TINY: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
COMMON: dict[str, Any] = TINY | {"hidden_act": "silu", "use_cache": True, "attn_implementation": "eager"}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def internlm_json(**changes: Any) -> dict[str, Any]:
    """What InternLM-7B's config.json holds, in this size."""
    code = {"AutoConfig": "configuration_internlm.InternLMConfig", "AutoModel": "modeling_internlm.InternLMModel"}
    config = COMMON | {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], "auto_map": code}
    return config | {"bias": True, "num_key_value_heads": HEADS} | changes


def internlm2_json(**changes: Any) -> dict[str, Any]:
    config = COMMON | {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    return config | {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"} | changes


def internlm3_json(**changes: Any) -> dict[str, Any]:
    config = COMMON | {"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"], "head_dim": HEAD_DIM}
    return config | {"rope_theta": 5e7, "bias": False, "qkv_bias": False} | changes


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Rows as ``rearrange(qkv, "(h gs d) -> h gs d")`` reads them: queries ``[:-2]``, key ``-2``, value ``-1``."""
    whole = torch.empty(KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM, *query.shape[1:])
    for head in range(HEADS):
        whole[head // (HEADS // KV_HEADS), head % (HEADS // KV_HEADS)] = query[head * HEAD_DIM : (head + 1) * HEAD_DIM]
    for head in range(KV_HEADS):
        whole[head, -2] = key[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        whole[head, -1] = value[head * HEAD_DIM : (head + 1) * HEAD_DIM]
    return whole.reshape(-1, *query.shape[1:])


def internlm2_tensors(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LLaMA's tensors by the names of the modules in ``modeling_internlm2.py``."""
    renamed = {"model.tok_embeddings.weight": llama["model.embed_tokens.weight"]}
    renamed |= {"model.norm.weight": llama["model.norm.weight"], "output.weight": llama["lm_head.weight"]}
    for index in range(TINY["num_hidden_layers"]):
        own, other = f"model.layers.{index}.", f"model.layers.{index}."
        for leaf in ("weight", "bias"):
            if f"{own}self_attn.q_proj.{leaf}" in llama:
                parts = [llama[f"{own}self_attn.{kind}_proj.{leaf}"] for kind in "qkv"]
                renamed[f"{other}attention.wqkv.{leaf}"] = fused(*parts)
                renamed[f"{other}attention.wo.{leaf}"] = llama[f"{own}self_attn.o_proj.{leaf}"]
        for kind, name in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            renamed[f"{other}feed_forward.{kind}.weight"] = llama[f"{own}mlp.{name}_proj.weight"]
        renamed[f"{other}attention_norm.weight"] = llama[f"{own}input_layernorm.weight"]
        renamed[f"{other}ffn_norm.weight"] = llama[f"{own}post_attention_layernorm.weight"]
    return renamed


# The LLaMA that it is; its config.json; which of the LLaMA's biases its code does not have.
CASES: dict[str, tuple[LlamaConfig, dict[str, Any], tuple[str, ...]]] = {
    "internlm": (LlamaConfig(**(TINY | {"num_key_value_heads": HEADS}), attention_bias=True), internlm_json(), ()),
    "internlm-dynamic": (
        LlamaConfig(**(TINY | {"num_key_value_heads": HEADS}), rope_parameters=DYNAMIC | {"factor": 1.0}),
        internlm_json(bias=False, rotary={"base": 10000, "type": "dynamic"}),
        (),
    ),
    "internlm-origin": (
        LlamaConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        internlm_json(bias=False, num_key_value_heads=KV_HEADS, rotary={"base": 500, "type": "origin"}),
        (),
    ),
    "internlm2": (LlamaConfig(**TINY, rope_theta=1e6), internlm2_json(), ()),
    "internlm2-biases": (
        LlamaConfig(**TINY, attention_bias=True, rope_parameters=DYNAMIC),
        internlm2_json(bias=True, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2.0}),
        (),
    ),
    "internlm3": (
        LlamaConfig(**TINY, rope_parameters=DYNAMIC | {"rope_theta": 5e7}),
        internlm3_json(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        (),
    ),
    "internlm3-qkv-biases": (
        LlamaConfig(**TINY, rope_theta=5e7, attention_bias=True),
        internlm3_json(qkv_bias=True),
        ("o_proj.bias",),
    ),
    "internlm3-other-biases": (
        LlamaConfig(**TINY, rope_theta=5e7, attention_bias=True, mlp_bias=True),
        internlm3_json(bias=True),
        ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    ),
}


class Rewritten:
    """A random LLaMA, and beside it the same model as an InternLM's folder."""

    def __init__(self, contract: Any, name: str) -> None:
        self.config, content, missing = CASES[name]
        self.llama: Path = contract.save(self.config)
        tensors = load_file(self.llama / "model.safetensors")
        for bias in [name for name in tensors if name.endswith(missing)] if missing else []:
            tensors[bias].zero_()
        save_file(tensors, self.llama / "model.safetensors", {"format": "pt"})
        stored = {name: tensor for name, tensor in tensors.items() if not missing or not name.endswith(missing)}
        if content["model_type"] == "internlm2":
            stored = internlm2_tensors(stored)
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD_DIM // 2)  # as old checkpoints have
        self.folder: Path = contract.folder / "internlm"
        self.folder.mkdir()
        save_file(stored, self.folder / "model.safetensors", {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
def rewritten(contract: Any, request: pytest.FixtureRequest) -> Rewritten:
    return Rewritten(contract, request.param)


@pytest.mark.parametrize("rewritten", CASES, indirect=True)
class TestInternLM:
    @pytest.mark.parametrize("length", [24, 48], ids=["within", "beyond"])
    def test_computes_what_the_llama_does(self, contract: Any, rewritten: Rewritten, length: int) -> None:
        """Beyond the positions that the model was made for, dynamic rotary embeddings differ from plain ones."""
        tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(3))
        source = SourceModel(rewritten.folder)
        source.verify()
        calls, hidden = source.calls(length), source.embed(tokens)
        with torch.no_grad():
            for index in range(len(source)):
                hidden = calls[index](source.make_block(index, source.block_tensors(index)), hidden)
        expected = contract.expected_logits(rewritten.llama, tokens)
        torch.testing.assert_close(source.logits(hidden), expected, rtol=1e-5, atol=1e-5)

    def test_exports_a_llama(self, contract: Any, rewritten: Rewritten) -> None:
        assert contract.round_trip_error(rewritten.config, stored_as=rewritten.folder) <= 1e-5
        exported = contract.folder / "exported"
        content = json.loads((exported / "config.json").read_text())
        assert content["model_type"] == "llama"
        assert content["architectures"] == ["LlamaForCausalLM"]
        assert "auto_map" not in content
        found, expected = (AutoConfig.from_pretrained(path).to_dict() for path in (exported, rewritten.llama))
        assert found | {"_name_or_path": ""} == expected | {"_name_or_path": ""}
        stored = [load_file(folder / "model.safetensors") for folder in (exported, rewritten.llama)]
        assert {name: tensor.shape for name, tensor in stored[0].items()} == {
            name: tensor.shape for name, tensor in stored[1].items()
        }


@pytest.mark.parametrize("stored", ["both", "head"])
def test_what_is_stored_decides_what_is_tied(contract: Any, stored: str) -> None:
    """As in the LLaMA that it is opened as."""
    llama, tokens = contract.tie(LlamaConfig(**TINY), stored), contract.tokens(LlamaConfig(**TINY))
    expected = contract.expected_logits(llama, tokens)
    tensors = load_file(llama / "model.safetensors")
    missing = {"model.embed_tokens.weight": torch.empty(0)} if stored == "head" else {}
    renamed = internlm2_tensors(tensors | missing)
    save_file({name: tensor for name, tensor in renamed.items() if tensor.numel()}, llama / "model.safetensors")
    (llama / "config.json").write_text(json.dumps(internlm2_json(tie_word_embeddings=True, rope_theta=1e4)))
    source = SourceModel(llama)
    torch.testing.assert_close(contract.logits(source, tokens), expected, rtol=1e-5, atol=1e-5)
    assert source.is_tied == (stored == "head")


def test_they_are_among_the_known_families() -> None:
    assert {"internlm", "internlm2", "internlm3"} <= set(registered_families())


class TestRefused:
    @pytest.fixture
    def rewritten(self, contract: Any) -> Rewritten:
        return Rewritten(contract, "internlm2")

    def test_rows_that_do_not_fit_the_heads(self, rewritten: Rewritten) -> None:
        self._change(rewritten, num_key_value_heads=4)
        with pytest.raises(ConfigurationError, match=r"^model\.path: .*wqkv\.weight has 48 rows, not 64"):
            SourceModel(rewritten.folder)

    def test_configuration_without_a_size(self, rewritten: Rewritten) -> None:
        self._change(rewritten, intermediate_size=None)
        with pytest.raises(ConfigurationError, match=r"^model\.path: .*internlm2.* intermediate_size"):
            SourceModel(rewritten.folder)

    def test_quantized_already(self, rewritten: Rewritten) -> None:
        self._change(rewritten, quantization_config={"quant_method": "awq", "bits": 4})
        with pytest.raises(ConfigurationError, match="is quantized already"):
            SourceModel(rewritten.folder)

    def test_missing_tensor(self, rewritten: Rewritten) -> None:
        tensors = load_file(rewritten.folder / "model.safetensors")
        del tensors["model.layers.1.feed_forward.w3.weight"]
        save_file(tensors, rewritten.folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigurationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            SourceModel(rewritten.folder).verify()

    @pytest.mark.parametrize("name", ["InternLM2ForRewardModel", "InternLM2ForSequenceClassification"])
    def test_another_head(self, rewritten: Rewritten, name: str) -> None:
        self._change(rewritten, architectures=[name])
        with pytest.raises(ConfigurationError, match=f"config.json: {name} is no causal language model"):
            SourceModel(rewritten.folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"rotary": {}},
            {"rotary": 3},
            {"rope_scaling": "linear"},
            {"rope_scaling": {"type": "linear"}},
            {"num_attention_heads": 0},
            {"num_attention_heads": "8"},
            {"hidden_size": "32"},
            {"vocab_size": "64"},
            {"num_hidden_layers": -1},
            {"pad_token_id": 64},
            {"hidden_act": "foo"},
            {"torch_dtype": "auto"},
        ],
        ids=str,
    )
    def test_values_that_make_no_model(self, rewritten: Rewritten, changes: dict[str, Any]) -> None:
        self._change(rewritten, **changes)
        with pytest.raises(ConfigurationError, match=r"^model\.path: .*config\.json: [^\n]+$"):
            SourceModel(rewritten.folder)

    @staticmethod
    def _change(rewritten: Rewritten, **changes: Any) -> None:
        path = rewritten.folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class TestTokenizer:
    """InternLM's tokenizers are code that comes with the checkpoint."""

    CODE = """
from transformers import PreTrainedTokenizerFast

class TinyTokenizer(PreTrainedTokenizerFast):
    def __init__(self, **options):
        super().__init__(**options)
        SUPER
"""

    @pytest.fixture
    def rewritten(self, contract: Any, monkeypatch: pytest.MonkeyPatch) -> Rewritten:
        model = Rewritten(contract, "internlm2")
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(contract.folder / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path, str(contract.folder / "modules")])
        words = {word: index for index, word in enumerate(["<unk>", "a", "b"])}
        Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(model.folder / "tokenizer.json"))
        settings = {"auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}, "unk_token": "<unk>"}
        settings["tokenizer_class"] = "TinyTokenizer"
        (model.folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (model.folder / "tokenization_tiny.py").write_text(self.CODE.replace("SUPER", "self.ours = True"))
        return model

    def test_does_not_run_unless_it_is_trusted(self, contract: Any, rewritten: Rewritten) -> None:
        """What transformers makes of a tokenizer.json without it is not the checkpoint's own."""
        assert not hasattr(SourceModel(rewritten.folder).tokenizer, "ours")
        (rewritten.folder / "tokenizer.json").unlink()
        assert SourceModel(rewritten.folder).tokenizer is None
        assert not (contract.folder / "modules").exists()

    def test_runs_if_it_is_trusted(self, rewritten: Rewritten) -> None:
        tokenizer = SourceModel(rewritten.folder, trust_remote_code=True).tokenizer
        assert tokenizer is not None
        assert tokenizer.ours
        assert tokenizer("b")["input_ids"] == [2]

    def test_code_for_another_transformers_is_no_tokenizer(self, rewritten: Rewritten) -> None:
        broken = self.CODE.replace("SUPER", "self.no_such_method()")
        (rewritten.folder / "tokenization_tiny.py").write_text(broken)
        found = SourceModel(rewritten.folder, trust_remote_code=True).found_tokenizer
        assert found.tokenizer is None
        assert "no_such_method" in (found.problem or "")

    def test_comes_with_the_export(self, contract: Any, rewritten: Rewritten) -> None:
        assert contract.round_trip_error(rewritten.config, stored_as=rewritten.folder) <= 1e-5
        exported = AutoTokenizer.from_pretrained(contract.folder / "exported", trust_remote_code=True)
        assert exported("b")["input_ids"] == [2]
