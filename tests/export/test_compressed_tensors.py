"""The compressed-tensors format, read back by its specification; tests/clients loads it with transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from kept_blocks import KeepBlocks
from omniquant_pl.export import open_format
from omniquant_pl.export.compressed_tensors import CompressedTensorsExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

SCHEMES = {
    "w2g8": (WeightSpec(2, 8), None),
    "w3": (WeightSpec(3), None),
    "w3g16sym": (WeightSpec(3, 16, symmetric=True), None),
    "w4g16-bf16": (WeightSpec(4, 16, scale_dtype="bfloat16"), None),
    "w5sym": (WeightSpec(5, symmetric=True), None),
    "w6g64": (WeightSpec(6, 64), None),
    "w7g4": (WeightSpec(7, 4), None),
    "w8-f32": (WeightSpec(8, scale_dtype="float32"), None),
    "mixed": (WeightSpec(3, 16, bits_of={"down_proj": 5, "q_proj": 8}), None),
    "w4a4": (WeightSpec(4), ActivationSpec(4)),
    "w6a6g16sym": (WeightSpec(6, 16, symmetric=True), ActivationSpec(6)),
    "w8a8-mixed": (WeightSpec(8, bits_of={"o_proj": 3}), ActivationSpec(8)),
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
MIXTURE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Takes the codes out of a stream of bits, the lowest first."""
    digits = np.unpackbits(words.contiguous().numpy().view(np.uint8), bitorder="little")
    assert not digits[bits * count :].any()
    return torch.from_numpy(digits[: bits * count].reshape(count, bits) @ (1 << np.arange(bits)))


def decode(tensors: dict[str, Tensor], linear: str, bits: int) -> Tensor:
    """Dequantizes as the format says: signed codes less signed zero points, times scales."""
    half, scale = 2 ** (bits - 1), tensors[f"{linear}.weight_scale"].float()
    zero_point = tensors.get(f"{linear}.weight_zero_point")
    if f"{linear}.weight_packed" in tensors:
        rows, columns = tensors[f"{linear}.weight_shape"].tolist()
        codes = torch.stack([stream(row, bits, columns) for row in tensors[f"{linear}.weight_packed"]]) - half
        if zero_point is not None:
            zero_point = torch.stack([stream(column, bits, rows) for column in zero_point.T], dim=1) - half
    else:
        codes = tensors[f"{linear}.weight"]
        assert codes.dtype == torch.int8
        codes = codes.int()
    columns = codes.shape[1]
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    per_column = [tensor.repeat_interleave(columns // scale.shape[1], dim=1) for tensor in (zeros, scale)]
    return (codes - per_column[0]) * per_column[1]


def written(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def matches(name: str, module: nn.Module, target: str) -> bool:
    """As compressed-tensors matches: a pattern, a name, or a class."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name or target in {kind.__name__ for kind in type(module).__mro__}


def scheme_of(name: str, module: nn.Module, config: dict[str, Any]) -> dict[str, Any] | None:
    """The entry for a module: of a name before a pattern before a class, ``None`` where it is ignored."""
    if any(matches(name, module, target) for target in config["ignore"]):
        return None
    found = [(t, group) for group in config["config_groups"].values() for t in group["targets"]]
    found = [(target, group) for target, group in found if matches(name, module, target)]
    found.sort(key=lambda item: (item[0] == type(module).__name__, item[0].startswith("re:")))
    return found[0][1] if found else None


@pytest.mark.parametrize(("weights", "activations"), SCHEMES.values(), ids=SCHEMES)
def test_folder_holds_the_calibrated_model(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    tmp_path: Path,
    weights: WeightSpec,
    activations: ActivationSpec | None,
) -> None:
    keep = KeepBlocks()
    folder = make_llama(intermediate_size=64, num_key_value_heads=2, attention_bias=True)
    model = OmniQuantModel(str(folder), weights, activations, transform=TransformSpec())
    trainer = fit(model, [keep], max_epochs=0)
    open_format("compressed-tensors", model, shard_bytes=8_000).write(model, trainer.run_folder, tmp_path / "out")
    tensors = written(tmp_path / "out")
    for index, block in enumerate(keep.blocks):
        for name, calibrated in block.tensors.items():
            stored = f"model.layers.{index}.{name}"
            linear = stored.removesuffix(".weight")
            if name.removesuffix(".weight") in block.quantized:
                assert torch.equal(decode(tensors, linear, weights.of_linear(linear).bits), calibrated)
                assert tensors[f"{linear}.weight_scale"].dtype == getattr(torch, weights.scale_dtype)
            else:
                assert torch.equal(tensors[stored], calibrated)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_configuration(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    for weights, activations in ((WeightSpec(4, 16), None), (WeightSpec(4, symmetric=True), ActivationSpec(6))):
        model = OmniQuantModel(str(llama), weights, activations)
        trainer = fit(model, max_epochs=0, default_root_dir=tmp_path / "run")
        open_format("compressed-tensors", model).write(model, trainer.run_folder, tmp_path / "out")
        config = quantization(tmp_path / "out")
        per_token = {"num_bits": 6, "type": "int", "symmetric": False, "dynamic": True}
        group = config["config_groups"]["group_0"]
        assert config["quantization_status"] == "compressed"
        assert config["ignore"][0] == "lm_head"
        assert group["targets"] == ["Linear"]
        if activations is None:
            assert config["format"] == "pack-quantized"
            assert set(config["config_groups"]) == {"group_0"}
            assert "input_activations" not in group
            assert group["weights"] == {
                "num_bits": 4,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 16,
                "dynamic": False,
            }
        else:
            assert config["format"] == "int-quantized"
            assert group["weights"]["strategy"] == "channel"
            assert group["weights"]["group_size"] is None
            assert group["input_activations"] == per_token | {"strategy": "token"}
            assert config["config_groups"]["group_1"] == {
                "targets": ["LlamaAttention"],
                "input_activations": per_token | {"strategy": "group", "group_size": 8},
            }
        assert ("quantized to 6 bit per token while" in (tmp_path / "out" / "README.md").read_text()) is bool(
            activations
        )


def opt(**changes: Any) -> PreTrainedModel:
    sizes = SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**(sizes | changes)))


def qwen_mixture() -> PreTrainedModel:
    sizes = MIXTURE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts_per_tok=2))


MODELS = {
    "opt-350m": (lambda: opt(word_embed_proj_dim=16, do_layer_norm_before=False), WeightSpec(4, 32), None),
    "opt-a8": (opt, WeightSpec(4, 64, bits_of={"fc1": 8}), ActivationSpec(8)),
    "mixture": (qwen_mixture, WeightSpec(4, 64, symmetric=True, bits_of={"q_proj": 3}), None),
}


class TestEveryLinear:
    """Programs find each quantized linear's own width, groups and inputs, and leave all else alone."""

    @pytest.fixture(params=MODELS)
    def exported(
        self, request: pytest.FixtureRequest, fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> tuple[OmniQuantModel, Path]:
        make, weights, activations = MODELS[request.param]
        make().save_pretrained(tmp_path / "source")
        model = OmniQuantModel(str(tmp_path / "source"), weights, activations)
        run = fit(model, max_epochs=0).run_folder
        open_format("compressed-tensors", model).write(model, run, tmp_path / "out")
        return model, tmp_path / "out"

    def test_has_its_entry(self, exported: tuple[OmniQuantModel, Path]) -> None:
        model, folder = exported
        config, tensors = quantization(folder), written(folder)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.source.folder))
        specs = {name.removesuffix(".weight"): found for name, found in model.quantized_weights.items()}
        experts = {name for name in specs if ".experts." in name}
        modules = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        assert set(specs) - experts < set(modules)
        for name, module in (modules | dict.fromkeys(experts, nn.Linear(1, 1))).items():
            entry = scheme_of(name, module, config)
            assert (entry is None) is (name not in specs), name
            if entry is not None:
                (spec, (rows, columns)), weights = specs[name], entry["weights"]
                assert weights["num_bits"] == spec.bits
                group_size = weights["group_size"] if weights["strategy"] == "group" else columns
                assert tensors[f"{name}.weight_scale"].shape == (rows, columns // group_size)
                inputs = entry.get("input_activations", {})
                assert inputs.get("group_size", columns) == columns
        assert all(scheme_of(name, nn.Linear(1, 1), config) is config["config_groups"]["group_0"] for name in experts)

    def test_router_is_named_for_programs_in_which_it_is_a_linear(self, exported: tuple[OmniQuantModel, Path]) -> None:
        model, folder = exported
        config = quantization(folder)
        gates = [name.removesuffix(".weight") for name in written(folder) if name.endswith(".gate.weight")]
        assert bool(gates) is (model.source.config.model_type == "qwen2_moe")
        assert all(scheme_of(gate, nn.Linear(1, 1), config) is None for gate in gates)


def test_rows_without_a_batch_get_a_range_each(fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    """OPT's MLP gets ``[tokens, channels]``, of which ``token`` would take one range for all."""
    opt().save_pretrained(tmp_path / "source")
    model = OmniQuantModel(str(tmp_path / "source"), WeightSpec(8), ActivationSpec(8))
    run = fit(model, max_epochs=0).run_folder
    open_format("compressed-tensors", model).write(model, run, tmp_path / "out")
    config = quantization(tmp_path / "out")
    inputs = {}
    for kind in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"):
        entry = scheme_of(f"model.decoder.layers.1.{kind}", nn.Linear(1, 1), config)
        assert entry is not None
        inputs[kind] = entry["input_activations"]
    assert [inputs[kind].get("group_size") for kind in inputs] == [None, None, 32, 64]
    assert [inputs[kind]["strategy"] for kind in inputs] == ["token", "token", "group", "group"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 4


def test_scales_of_experts_keep_products_exact(fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    """Transformers multiplies them with codes in their own dtype."""
    keep = KeepBlocks()
    qwen_mixture().save_pretrained(tmp_path / "source")
    model = OmniQuantModel(str(tmp_path / "source"), WeightSpec(3, 32, symmetric=True))
    run = fit(model, [keep], max_epochs=0).run_folder
    open_format("compressed-tensors", model).write(model, run, tmp_path / "out")
    tensors = written(tmp_path / "out")
    for name in ("mlp.experts.3.down_proj", "mlp.shared_expert.up_proj"):
        stored = f"model.layers.1.{name}"
        assert tensors[f"{stored}.weight_scale"].dtype == torch.float32
        assert torch.equal(decode(tensors, stored, 3), keep.blocks[1].tensors[f"{name}.weight"])


class TestRefusal:
    def reason(self, folder: Path, weights: WeightSpec, **settings: Any) -> str:
        return str(CompressedTensorsExport().refusal(OmniQuantModel(str(folder), weights, **settings)))

    def test_schemes(self, llama: Path) -> None:
        assert "model.layers.0.mlp.down_proj: 48 input channels" in self.reason(llama, WeightSpec(4, 32))
        assert "symmetric activations" in self.reason(
            llama, WeightSpec(8), activations=ActivationSpec(8, symmetric=True)
        )

    def test_what_fits(self, llama: Path) -> None:
        for bits in range(2, 9):
            assert self.reason(llama, WeightSpec(bits, 16)) == "None"
            assert self.reason(llama, WeightSpec(bits), activations=ActivationSpec(bits)) == "None"

    def test_experts(self, tmp_path: Path) -> None:
        MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=2)).save_pretrained(tmp_path)
        symmetric = WeightSpec(4, 16, symmetric=True)
        assert self.reason(tmp_path, symmetric) == "None"
        assert "zero points" in self.reason(tmp_path, WeightSpec(4, 16))
        assert "one width" in self.reason(tmp_path, WeightSpec(4, symmetric=True, bits_of={"w2": 8}))
        assert "experts get" in self.reason(tmp_path, symmetric, activations=ActivationSpec(8))

    def test_linears_of_another_class(self, tmp_path: Path) -> None:
        FalconForCausalLM(FalconConfig(**SIZES)).save_pretrained(tmp_path)
        assert "FalconLinear" in self.reason(tmp_path, WeightSpec(4))

    def test_attention_that_cannot_be_wrapped(self, tmp_path: Path) -> None:
        Gemma2ForCausalLM(Gemma2Config(**MIXTURE, head_dim=8)).save_pretrained(tmp_path)
        assert self.reason(tmp_path, WeightSpec(4, 16)) == "None"
        assert "caps its logits" in self.reason(tmp_path, WeightSpec(8), activations=ActivationSpec(8))
