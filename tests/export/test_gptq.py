"""The gptq format, read back by its specification; tests/clients loads it with the programs it is meant for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

from kept_blocks import KeepBlocks
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import open_format
from omniquant_pl.export.gptq import GptqExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

SUFFIXES = {"qweight", "qzeros", "scales", "g_idx"}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
SCHEMES = {
    "w2g16": WeightSpec(2, 16),
    "w3": WeightSpec(3),
    "w3g32": WeightSpec(3, 32),
    "w3g32sym": WeightSpec(3, 32, symmetric=True),
    "w4g32": WeightSpec(4, 32),
    "w4sym": WeightSpec(4, symmetric=True),
    "w8g1024": WeightSpec(8, 1024),
    "w8g16sym": WeightSpec(8, 16, symmetric=True),
}


def stream(words: Tensor, bits: int, count: int) -> list[int]:
    """Reads words as one little-endian number, whose digits are the codes."""
    number = sum((word % 2**32) << (32 * index) for index, word in enumerate(words.tolist()))
    assert number >> (bits * count) == 0, "bits that hold no code are set"
    return [(number >> (bits * index)) % 2**bits for index in range(count)]


def decode(tensors: dict[str, Tensor], linear: str, bits: int) -> Tensor:
    """Dequantizes as the format says: ``(code - zero) * scale`` of the group that ``g_idx`` names."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{linear}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")
    )
    rows, columns = qweight.shape[1], len(g_idx)
    codes = torch.tensor([stream(column, bits, columns) for column in qweight.T])
    zeros = torch.tensor([stream(row, bits, rows) for row in qzeros])
    assert scales.dtype == torch.float16
    return (codes - zeros[g_idx.long()].T) * scales[g_idx.long()].T.float()


def written(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("weights", SCHEMES.values(), ids=SCHEMES)
def test_folder_holds_the_calibrated_model(
    make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path, weights: WeightSpec
) -> None:
    keep = KeepBlocks()
    model = OmniQuantModel(str(make_llama(**WIDE, attention_bias=True)), weights, transform=TransformSpec())
    trainer = fit(model, [keep], max_epochs=0)
    open_format("gptq", model).write(model, trainer.run_folder, tmp_path / "out")
    tensors = written(tmp_path / "out")
    for index, block in enumerate(keep.blocks):
        for name, calibrated in block.tensors.items():
            stored = f"model.layers.{index}.{name}"
            linear = stored.removesuffix(".weight")
            if name.removesuffix(".weight") in block.quantized:
                assert torch.equal(decode(tensors, linear, weights.bits), calibrated)
                assert stored not in tensors
                expected = torch.arange(calibrated.shape[1]) // (weights.group_size or calibrated.shape[1])
                assert torch.equal(tensors[f"{linear}.g_idx"], expected.int())
            else:
                assert torch.equal(tensors[stored], calibrated)


def test_configuration(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    for weights in (WeightSpec(4, 16), WeightSpec(8, symmetric=True), WeightSpec(2, bits_of=dict.fromkeys(KINDS, 4))):
        model = OmniQuantModel(str(llama), weights)
        trainer = fit(model, max_epochs=0, default_root_dir=tmp_path / "run")
        open_format("gptq", model).write(model, trainer.run_folder, tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config == json.loads((llama / "config.json").read_text())
        assert quantization.pop("meta")["quantizer"][0].startswith("omniquant-pl:")
        assert quantization == {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": 4 if weights.bits_of else weights.bits,
            "group_size": weights.group_size or -1,
            "sym": weights.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "backend": "torch",
        }
        assert "gptqmodel" in (tmp_path / "out" / "README.md").read_text()


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_files_are_as_large_as_planned(
    make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    model = OmniQuantModel(str(make_llama(**WIDE)), WeightSpec(3, 32))
    run = fit(model, max_epochs=0).run_folder
    limit = 10_000
    open_format("gptq", model, shard_bytes=limit).write(model, run, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = written(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in tensors} == SUFFIXES | {"weight"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1


class TestRefusal:
    def reason(self, folder: Path, weights: WeightSpec, **settings: Any) -> str | None:
        return GptqExport().refusal(OmniQuantModel(str(folder), weights, **settings))

    @pytest.mark.parametrize(
        ("weights", "settings", "reason"),
        [
            (WeightSpec(5), {}, "not 5"),
            (WeightSpec(4, 8), {}, "group_size is 8"),
            (WeightSpec(4, 32), {}, "model.layers.0.mlp.down_proj: 48 input channels"),
            (WeightSpec(3, 16), {}, "multiples of 32"),
            (WeightSpec(4, bits_of={"q_proj": 8}), {}, "one width"),
            (WeightSpec(4, scale_dtype="bfloat16"), {}, "not bfloat16"),
            (WeightSpec(4), {"activations": ActivationSpec(8)}, "activations"),
        ],
    )
    def test_schemes(self, llama: Path, weights: WeightSpec, settings: dict[str, Any], reason: str) -> None:
        assert reason in str(self.reason(llama, weights, **settings))

    def test_what_fits(self, llama: Path) -> None:
        for weights in (WeightSpec(4), WeightSpec(2, 16, symmetric=True), WeightSpec(8, 64)):
            assert self.reason(llama, weights) is None

    def test_experts(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
        config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
        MixtralForCausalLM(config).save_pretrained(tmp_path)
        assert "experts" in str(self.reason(tmp_path, WeightSpec(4)))

    def test_linears_of_another_class(self, tmp_path: Path) -> None:
        config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
        FalconForCausalLM(config).save_pretrained(tmp_path)
        assert "FalconLinear" in str(self.reason(tmp_path, WeightSpec(4)))

    def test_the_formats_that_can_are_named(self, llama: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"gptq cannot hold .* not 5; .*compressed-tensors"):
            open_format("gptq", OmniQuantModel(str(llama), WeightSpec(5)))
