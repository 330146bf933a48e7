"""A loaded folder computes the calibrated model, whatever the family, with a cache and in half precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from family_contract import FamilyContract
from omniquant_pl.checkpoint import Checkpoint
from omniquant_pl.export import HfExport
from omniquant_pl.export.packed import PackedExport
from omniquant_pl.export.verification import calibrated_logits
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import PackedLinear, load_packed, weight_bytes
from omniquant_pl.spec import ActivationSpec, RotationSpec, WeightSpec

Finish = Callable[[OmniQuantModel], RunFolder]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 48,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
PLAIN = {name: value for name, value in TINY.items() if name not in ("num_key_value_heads", "intermediate_size")}
FALCON = PLAIN | {"hidden_size": 48, "num_attention_heads": 3, "ffn_hidden_size": 64}
GEMMA = TINY | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
MOE = TINY | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**TINY, tie_word_embeddings=False),
    "llama-biases-tied": lambda: LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2-tied": lambda: Qwen2Config(**TINY, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**TINY, num_local_experts=3),
    "qwen2-moe": lambda: Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=20),
    "qwen3-moe-and-dense": lambda: Qwen3MoeConfig(**MOE, head_dim=16, mlp_only_layers=[0]),
    "phi": lambda: PhiConfig(**TINY),
    "phi3-fused": lambda: Phi3Config(**TINY, head_dim=16, sliding_window=8),
    "opt": lambda: OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "opt-350m": lambda: OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon-7b": lambda: FalconConfig(**FALCON),
    "falcon-rw": lambda: FalconConfig(**FALCON, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "gemma2-capped": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=0.5),
    "gemma3-with-vision": lambda: Gemma3Config(
        text_config=GEMMA | {"sliding_window_pattern": 2},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=63,
    ),
}
SCHEMES = {
    "w3g16": (WeightSpec(3, 16), None),
    "w5a7": (WeightSpec(5, bits_of={"down_proj": 7, "fc2": 6}), ActivationSpec(7)),
}


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def mostly_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """For quantized activations: sums in another order may move one that is half-way between two codes."""
    return bool(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() <= tolerance)


def exported(
    source: Path, finish: Finish, output: Path, scheme: str, **options: Any
) -> tuple[OmniQuantModel, RunFolder]:
    weights, activations = SCHEMES[scheme]
    model = OmniQuantModel(str(source), weights, activations, **options)
    run = finish(model)
    PackedExport().write(model, run, output)
    return model, run


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family(tmp_path: Path, finish: Finish, family: str, scheme: str) -> None:
    contract, config = FamilyContract(tmp_path), FAMILIES[family]()
    model, run = exported(contract.save(config), finish, tmp_path / "packed", scheme)
    tokens = contract.tokens(config)
    expected = calibrated_logits(model, run, tokens, quantizes_activations=True)
    network = load_packed(tmp_path / "packed")
    linears = sum(isinstance(module, PackedLinear) for module in network.modules())
    assert linears == sum(len(layout.linears) for layout in model.source.layouts)
    agree = close if scheme == "w3g16" else mostly_close
    assert agree(network(tokens, use_cache=False).logits, expected, 1e-5)
    # In parts, with keys and values from the cache.
    steps, cache = [], None
    for part in tokens.split([9, 1, 1, 11, 1, 1], dim=1):
        output = network(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert agree(torch.cat(steps, 1), expected, 1e-5)


def test_converted_family(tmp_path: Path, make_llama: Callable[..., Path], finish: Finish, tokens: Tensor) -> None:
    """What is exported of an InternLM is a LLaMA."""
    source = make_llama(attention_bias=True)
    content = json.loads((source / "config.json").read_text()) | {"model_type": "internlm", "bias": True}
    (source / "config.json").write_text(json.dumps(content))
    model, run = exported(source, finish, tmp_path / "packed", "w3g16")
    network = load_packed(tmp_path / "packed")
    assert network.config.model_type == "llama"
    assert close(network(tokens).logits, calibrated_logits(model, run, tokens, True), 1e-5)


def test_checkpoint_without_the_head(
    tmp_path: Path, make_llama: Callable[..., Path], finish: Finish, tokens: Tensor
) -> None:
    """Its names lack the head's prefix."""
    LlamaForCausalLM.from_pretrained(make_llama(tie_word_embeddings=True)).model.save_pretrained(tmp_path / "base")
    model, run = exported(tmp_path / "base", finish, tmp_path / "packed", "w5a7")
    assert "layers.0.mlp.up_proj.packed" in Checkpoint(tmp_path / "packed")
    expected = calibrated_logits(model, run, tokens, True)
    assert close(load_packed(tmp_path / "packed")(tokens).logits, expected, 1e-5)


def test_rotated_model_comes_untied(
    tmp_path: Path, make_llama: Callable[..., Path], finish: Finish, tokens: Tensor
) -> None:
    source = make_llama(tie_word_embeddings=True)
    model, run = exported(source, finish, tmp_path / "packed", "w5a7", rotation=RotationSpec())
    network = load_packed(tmp_path / "packed")
    assert network.get_input_embeddings().weight is not network.get_output_embeddings().weight
    assert close(network(tokens).logits, calibrated_logits(model, run, tokens, True), 1e-5)


def test_tied_embeddings_are_one(tmp_path: Path, make_llama: Callable[..., Path], finish: Finish) -> None:
    exported(make_llama(tie_word_embeddings=True), finish, tmp_path / "packed", "w3g16")
    network = load_packed(tmp_path / "packed")
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert "lm_head.weight" not in Checkpoint(tmp_path / "packed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(tmp_path: Path, llama: Path, finish: Finish, tokens: Tensor, dtype: torch.dtype) -> None:
    exported(llama, finish, tmp_path / "packed", "w3g16")
    whole, half = load_packed(tmp_path / "packed"), load_packed(tmp_path / "packed", dtype)
    assert half.dtype == dtype
    logits = half(tokens).logits
    assert logits.dtype == dtype
    assert close(logits, whole(tokens).logits, 20 * torch.finfo(dtype).eps)


def test_memory(
    tmp_path: Path, make_llama: Callable[..., Path], finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model takes little more than its file, and no more than a block is read at once."""
    source = make_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    exported(source, finish, tmp_path / "packed", "w3g16")
    read, original = [], Checkpoint.read

    def note(checkpoint: Checkpoint, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = original(checkpoint, names)
        read.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    monkeypatch.setattr(Checkpoint, "read", note)
    network = load_packed(tmp_path / "packed")
    stored = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert 0.9 * stored < weight_bytes(network) < 1.1 * stored
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert max(read) < sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.1." in name)
    assert sum(read) <= stored


def test_no_weight_is_copied_into_another_dtype(tmp_path: Path, llama: Path, finish: Finish) -> None:
    exported(llama, finish, tmp_path / "packed", "w3g16")
    network = load_packed(tmp_path / "packed", torch.float32)
    dtypes = {
        tensor.dtype for module in network.modules() if isinstance(module, PackedLinear) for tensor in module.buffers()
    }
    assert dtypes == {torch.int32, torch.float16, torch.uint8}


@torch.no_grad()
def test_generates_as_the_dequantized_model(tmp_path: Path, llama: Path, finish: Finish, tokens: Tensor) -> None:
    """transformers' own greedy search, on the folder that transformers loads by itself."""
    model, run = exported(llama, finish, tmp_path / "packed", "w3g16")
    HfExport().write(model, run, tmp_path / "hf")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found, expected = (
        network.generate(tokens[:, :4], **options)
        for network in (load_packed(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_on_the_device(tmp_path: Path, llama: Path, finish: Finish, tokens: Tensor, scheme: str) -> None:
    model, run = exported(llama, finish, tmp_path / "packed", scheme)
    network = load_packed(tmp_path / "packed", device="cuda")
    assert {tensor.device.type for tensor in (*network.parameters(), *network.buffers())} == {"cuda"}
    expected = calibrated_logits(model, run, tokens, True)
    agree = close if scheme == "w3g16" else mostly_close
    assert agree(network(tokens.cuda()).logits.cpu(), expected, 1e-4)
