"""A head that differs from the embedding it should be, and one that is stored alone, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport, open_format
from omniquant_pl.export.packed import PackedExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import load_packed
from omniquant_pl.spec import RotationSpec, WeightSpec

Finish = Callable[[OmniQuantModel], RunFolder]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 80,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA3 = SIZES | {"head_dim": 32, "layer_types": ["full_attention"]}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
    "gemma3": Gemma3Config(text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4, image_token_index=79),
    "phi3": Phi3Config(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2),
    "opt": OPTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64, vocab_size=80, word_embed_proj_dim=64
    ),
    "falcon": FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=80),
}


def save(config: PretrainedConfig, folder: Path, stored: str) -> tuple[Tensor, Tensor]:
    """Saves a model whose configuration ties; ``both`` weights, or the ``head`` alone; returns embedding and head."""
    config = type(config).from_dict(config.to_dict() | {"tie_word_embeddings": False})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.get_output_embeddings().weight.normal_(std=0.1)
    embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if stored == "head":
        (name,) = (name for name, tensor in tensors.items() if torch.equal(tensor, embedding))
        del tensors[name]
        embedding = head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    return embedding, head


class Case(NamedTuple):
    """A model and its run, and the embedding and the head that transformers loads of it."""

    model: OmniQuantModel
    run: RunFolder
    embedding: Tensor
    head: Tensor


@pytest.fixture(scope="module")
def case_of(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """Makes the case of a family, and of what is stored, once."""

    @cache
    def case_of(family: str, stored: str) -> Case:
        folder = tmp_path_factory.mktemp(family)
        embedding, head = save(FAMILIES[family], folder, stored)
        check(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), embedding, head)
        model = OmniQuantModel(str(folder), WeightSpec(4, 32, symmetric=True))
        return Case(model, finish(model), embedding, head)

    return case_of


CaseOf = Callable[[str, str], Case]


def families(*families: str) -> pytest.MarkDecorator:
    """Runs a test with these families, and both weights or the head alone stored."""
    cases = [(family, stored) for family in families for stored in ("both", "head")]
    return pytest.mark.parametrize(("family", "stored"), cases, ids=map("-".join, cases))


def check(network: PreTrainedModel, embedding: Tensor, head: Tensor) -> None:
    assert torch.equal(network.get_input_embeddings().weight, embedding)
    assert torch.equal(network.get_output_embeddings().weight, head)


@families(*FAMILIES)
def test_hf(case_of: CaseOf, tmp_path: Path, family: str, stored: str) -> None:
    model, run, embedding, head = case_of(family, stored)
    HfExport().write(model, run, tmp_path / "hf")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), embedding, head)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] == (stored == "head")


@families(*FAMILIES)
def test_packed(case_of: CaseOf, tmp_path: Path, family: str, stored: str) -> None:
    """What ``generate`` runs: a packed folder, and the same in memory."""
    model, run, embedding, head = case_of(family, stored)
    PackedExport().write(model, run, tmp_path / "packed")
    check(load_packed(tmp_path / "packed"), embedding, head)
    check(PackedExport().in_memory(model, run), embedding, head)


@families(*(family for family in FAMILIES if family != "falcon"))
@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_other_safetensors(case_of: CaseOf, tmp_path: Path, family: str, stored: str, name: str) -> None:
    """Their programs build the model as transformers does: by the configuration and the tensors' names."""
    model, run, embedding, head = case_of(family, stored)
    if (family, name) == ("mixtral", "gptq"):
        with pytest.raises(ConfigurationError, match="holds experts as 3-D weights"):
            open_format(name, model)
        return
    open_format(name, model).write(model, run, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    heads = [tensor for key, tensor in tensors.items() if key.endswith("lm_head.weight")]
    (stored_embedding,) = (tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
    assert torch.equal(stored_embedding, embedding)
    assert [torch.equal(tensor, head) for tensor in heads] == ([True] if stored == "both" else [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (stored == "head")


@families("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral")
def test_gguf(case_of: CaseOf, tmp_path: Path, family: str, stored: str) -> None:
    """llama.cpp takes the embedding where there is no ``output.weight``."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    model, run, embedding, head = case_of(family, stored)
    if family == "gemma" and stored == "both":
        with pytest.raises(ConfigurationError, match="has the embedding as the head in this family"):
            open_format("gguf", model)
        return
    open_format("gguf", model).write(model, run, tmp_path / "out")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert np.array_equal(found["token_embd.weight"], embedding.numpy())
    assert ("output.weight" in found) == (stored == "both")
    assert np.array_equal(found.get("output.weight", found["token_embd.weight"]), head.numpy())


@families("llama", "mistral", "qwen2", "qwen3")
def test_mlc(case_of: CaseOf, tmp_path: Path, family: str, stored: str) -> None:
    """MLC-LLM has a head of its own unless ``tie_word_embeddings`` is true, which its Mistral does not know."""
    model, run, embedding, head = case_of(family, stored)
    if family == "mistral" and stored == "head":
        with pytest.raises(ConfigurationError, match="mlc cannot hold this model exactly"):
            open_format("mlc", model)
        return
    open_format("mlc", model).write(model, run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert config["model_config"].get("tie_word_embeddings", False) == (stored == "head")
    shard = next((tmp_path / "out").glob("params_shard_*.bin")).read_bytes()
    records = json.loads((tmp_path / "out" / "tensor-cache.json").read_text())["records"][0]["records"]
    found = {
        record["name"]: np.frombuffer(shard, np.float16, record["nbytes"] // 2, record["byteOffset"])
        for record in records
        if record["dtype"] == "float16"
    }
    assert np.array_equal(found["model.embed_tokens.weight"], embedding.half().numpy().ravel())
    assert ("lm_head.weight" in found) == (stored == "both")
    assert np.array_equal(found.get("lm_head.weight", embedding.half().numpy()).ravel(), head.half().numpy().ravel())


@families("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral")
def test_a_rotated_model_computes_the_same(finish: Finish, tmp_path: Path, family: str, stored: str) -> None:
    """In 8 bit it gives nearly the logits of the model that was rotated; with another head they would be others."""
    save(FAMILIES[family], tmp_path / "source", stored)
    weights = WeightSpec(8, 16, scale_dtype="float32")
    model = OmniQuantModel(str(tmp_path / "source"), weights, rotation=RotationSpec())
    HfExport().write(model, finish(model), tmp_path / "hf")
    tokens = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    folders = (tmp_path / "source", tmp_path / "hf")
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in folders
        )
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
