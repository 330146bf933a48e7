"""The exported folder, loaded by transformers, is the calibrated model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from kept_blocks import KeepBlocks
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport
from omniquant_pl.export.card import model_card
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import (
    ActivationSpec,
    ObjectiveSpec,
    RotationSpec,
    RoundingSpec,
    TransformSpec,
    WeightSpec,
    WindowSpec,
)
from omniquant_pl.trainer import SequentialTrainer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILY = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gqa": {"num_key_value_heads": 2},
    "mqa-tied-biases": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
}


def quantized_model(folder: Path, **changes: Any) -> OmniQuantModel:
    options = {"weights": WeightSpec(bits=3, group_size=16), "transform": TransformSpec(mlp=True)}
    return OmniQuantModel(path=str(folder), **(options | changes))


@pytest.fixture
def finished(llama: Path, fit: Callable[..., SequentialTrainer]) -> tuple[OmniQuantModel, RunFolder]:
    model = quantized_model(llama)
    return model, fit(model, max_epochs=0).run_folder


@pytest.mark.parametrize("family", FAMILY)
def test_transformers_computes_the_calibrated_logits(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    logits_of: Callable[..., Tensor],
    tokens: Tensor,
    tmp_path: Path,
    family: str,
) -> None:
    folder, keep = make_llama(**FAMILY[family]), KeepBlocks()
    model = quantized_model(folder)
    trainer = fit(model, [keep])
    HfExport().write(model, trainer.run_folder, tmp_path / "out")
    calibrated, loaded = keep.logits(model, tokens), logits_of(tmp_path / "out", tokens)
    assert (loaded - calibrated).norm() < 1e-5 * calibrated.norm()
    assert (logits_of(folder, tokens) - calibrated).norm() > 1e-2 * calibrated.norm()


@pytest.mark.parametrize(
    "weights",
    [WeightSpec(bits=2), WeightSpec(bits=3, group_size=20), WeightSpec(bits=4, symmetric=True)],
    ids=["w2", "w3g20", "w4sym"],
)
def test_weights_take_the_values_of_their_codes(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    tmp_path: Path,
    weights: WeightSpec,
) -> None:
    model = quantized_model(make_llama(num_key_value_heads=2), weights=weights)
    trainer = fit(model)
    HfExport().write(model, trainer.run_folder, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    quantized = [tensor for name, tensor in exported.items() if name.split(".")[-2] in LINEARS]
    assert len(quantized) == 2 * len(LINEARS)
    counts = []
    for tensor in quantized:
        size = weights.group_size or tensor.shape[1]
        counts += [len(group.unique()) for row in tensor for group in row.split(size)]
    assert 2 < max(counts) <= 2**weights.bits


def test_weights_that_are_not_quantized_stay(
    make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    folder = make_llama(attention_bias=True)
    model = quantized_model(folder, transform=None)
    HfExport().write(model, fit(model).run_folder, tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        is_weight = name.endswith(".weight") and name.split(".")[-2] in LINEARS
        assert torch.equal(tensor, after[name]) is not is_weight, name


def test_shards(
    finished: tuple[OmniQuantModel, RunFolder],
    logits_of: Callable[..., Tensor],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    HfExport().write(*finished, tmp_path / "whole")
    HfExport(shard_bytes=20_000).write(*finished, tmp_path / "parts")
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = [load_file(file) for file in files]
    assert sum(len(part) for part in parts) == len(whole)
    for part in parts:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
        assert sum(tensor.nbytes for tensor in part.values()) <= 20_000
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert torch.equal(logits_of(tmp_path / "parts", tokens), logits_of(tmp_path / "whole", tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_storage_is_the_float32_folder_rounded_once(
    finished: tuple[OmniQuantModel, RunFolder], tmp_path: Path, dtype: str
) -> None:
    HfExport().write(*finished, tmp_path / "full")
    HfExport(dtype).write(*finished, tmp_path / "half")
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert all(torch.equal(half[name], full[name].to(getattr(torch, dtype))) for name in full)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == getattr(torch, dtype)  # what config.json says


def test_half_precision_source_keeps_its_configuration(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    """Older checkpoints call the dtype ``torch_dtype``; both names at once would contradict."""
    source = tmp_path / "source"
    LlamaForCausalLM.from_pretrained(llama, dtype=torch.float16).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = 12345.0
    (source / "config.json").write_text(json.dumps(config))
    model = quantized_model(source)
    HfExport().write(model, fit(model, max_epochs=0).run_folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["torch_dtype"]
    assert written == config | {"dtype": "float32"}
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_checkpoint_without_the_head(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    logits_of: Callable[..., Tensor],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    """The names in the file, which lack the head's prefix, are kept."""
    whole, base = make_llama(tie_word_embeddings=True), tmp_path / "base"
    LlamaForCausalLM.from_pretrained(whole).model.save_pretrained(base)
    logits = []
    for name, folder in (("whole", whole), ("base", base)):
        model = quantized_model(folder)
        trainer = fit(model, max_epochs=0, default_root_dir=tmp_path / f"{name}-run")
        HfExport().write(model, trainer.run_folder, tmp_path / f"{name}-out")
        logits.append(logits_of(tmp_path / f"{name}-out", tokens))
    assert set(load_file(tmp_path / "base-out" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    assert torch.equal(*logits)


def test_companions_come_along(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(source)
    copied = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"}
    copied |= {"merges.txt", "vocab.json", "vocab.bpe", "own.tiktoken", "special_tokens_map.json", "LICENSE.txt"}
    copied |= {"NOTICE", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja"}
    left = {"pytorch_model.bin", "training_args.json", "modeling_custom.py"}
    (source / "additional_chat_templates").mkdir()
    for name in copied | left:
        (source / name).write_text(f"content of {name}")
    (source / "tokenizer_files").mkdir()
    model = OmniQuantModel(path=str(source))
    run = fit(model, max_epochs=0).run_folder
    for _ in range(2):  # an export with a folder of templates may be replaced as well
        HfExport().write(model, run, tmp_path / "out")
    for name in copied:
        assert (tmp_path / "out" / name).read_text() == f"content of {name}"
    assert not any((tmp_path / "out" / name).exists() for name in left)
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.25


class TestWhole:
    """A folder appears whole, or the one before it stays."""

    @pytest.fixture
    def previous(self, finished: tuple[OmniQuantModel, RunFolder], tmp_path: Path) -> Path:
        folder = tmp_path / "exports" / "out"
        HfExport().write(*finished, folder)
        return folder

    def test_failing_export_keeps_the_previous_folder(
        self,
        previous: Path,
        finished: tuple[OmniQuantModel, RunFolder],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = {path.name: path.read_bytes() for path in previous.iterdir()}
        model, run = finished
        run.factor_file(1).write_bytes(b"damaged")  # found when the first block is written already
        with pytest.raises(ConfigurationError, match=r"00001\.safetensors"):
            HfExport(shard_bytes=20_000).write(model, run, previous)
        assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
        assert [path.name for path in previous.parent.iterdir()] == ["out"]

    def test_new_export_replaces_the_previous_folder(
        self, previous: Path, finished: tuple[OmniQuantModel, RunFolder]
    ) -> None:
        (previous / "stale.safetensors").write_text("of another model")
        HfExport(shard_bytes=20_000).write(*finished, previous)
        assert not (previous / "stale.safetensors").exists()
        assert not (previous / "model.safetensors").exists()
        assert [path.name for path in previous.parent.iterdir()] == ["out"]

    def test_failing_first_export_leaves_nothing(
        self, finished: tuple[OmniQuantModel, RunFolder], tmp_path: Path
    ) -> None:
        model, run = finished
        run.factor_file(0).write_bytes(b"damaged")
        with pytest.raises(ConfigurationError, match=r"00000\.safetensors"):
            HfExport().write(model, run, tmp_path / "exports" / "out")
        assert list((tmp_path / "exports").iterdir()) == []


class TestCard:
    def card(self, model: OmniQuantModel, run: RunFolder, output: Path) -> str:
        HfExport().write(model, run, output)
        return (output / "README.md").read_text()

    def test_what_it_tells(self, finished: tuple[OmniQuantModel, RunFolder], tmp_path: Path) -> None:
        model, run = finished
        values = {"full_precision": 5.0, "round_to_nearest": 7.25, "quantized": 6.5}
        run.write_metrics({"perplexity": {"wikitext2": values}})
        card = self.card(model, run, tmp_path / "out")
        assert "base_model" not in card  # of a local folder only the name is told
        assert str(model.source.folder.parent) not in card
        assert f"# {model.source.folder.name}, w3a16g16" in card
        assert "w3a16g16" in card
        assert "| wikitext2 | 5.0000 | 7.2500 | 6.5000 |" in card
        assert "learned clipping and transform" in card
        assert "float32" in card

    def test_activation_schemes_say_what_a_loader_leaves_out(
        self, llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> None:
        model = OmniQuantModel(path=str(llama), activations=ActivationSpec(bits=4))
        card = self.card(model, fit(model, max_epochs=0).run_folder, tmp_path / "out")
        assert "quantizes activations to 4 bit" in card

    @pytest.mark.parametrize(
        ("epochs", "settings", "method"),
        [
            (
                1,
                {"transform": TransformSpec(), "rounding": RoundingSpec("learned")},
                "learned clipping, transform and rounding",
            ),
            (1, {"objective": ObjectiveSpec(window=WindowSpec(2))}, "learned clipping, windows of 2 blocks"),
            (1, {"rotation": RotationSpec()}, "learned clipping, Hadamard rotations folded in"),
            (
                0,
                {"transform": TransformSpec(), "objective": ObjectiveSpec(window=WindowSpec(2))},
                "clipping and transform as they start",
            ),
            (0, {"clipping": None, "rounding": RoundingSpec("gptq")}, "nothing learned, GPTQ rounding"),
        ],
    )
    def test_method(self, llama: Path, tmp_path: Path, epochs: int, settings: dict[str, Any], method: str) -> None:
        (tmp_path / "config.yaml").write_text(f"trainer: {{max_epochs: {epochs}}}")
        card = model_card(OmniQuantModel(path=str(llama), **settings), RunFolder(tmp_path), "")
        assert f"({method}) on" in card
