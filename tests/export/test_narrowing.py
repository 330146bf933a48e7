"""No export holds an infinity that the model does not have, nor does what loads it make one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from omniquant_pl.callbacks import ExportCallback
from omniquant_pl.commands.export import export_run
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import FORMATS, open_format, open_runnable
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import load_packed
from omniquant_pl.spec import TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer
from tiny_tokenizers import byte_level

Finish = Callable[[OmniQuantModel], RunFolder]
WITH_FLOATS = sorted(set(FORMATS) - {"factors"})
OF_TRANSFORMERS = ["hf", "gptq", "compressed-tensors"]
LARGE = 7.0e4
FOUND = r"has the value 70144, beyond float16 \(at most 65504\)"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"
WEIGHT, BIAS = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"


@pytest.fixture
def large(make_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A LLaMA in bfloat16, one tensor of which has values that float16 does not hold."""

    def make(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 520}
        model = AutoModelForCausalLM.from_pretrained(make_llama(**sizes, **changes))
        model.state_dict()[name].view(-1)[3] = LARGE
        model.to(dtype).save_pretrained(tmp_path / "source")
        byte_level().save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def exported(model: Path, target: Path, format_name: str, dtype: Any, finish: Finish) -> Path:
    settings = OmniQuantModel(str(model), WeightSpec(3, 32))
    open_format(format_name, settings, dtype).write(settings, finish(settings), target)
    return target


class TestBeforeAnyWork:
    """What no calibration changes is known when the settings are."""

    @pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight", NORM])
    @pytest.mark.parametrize("format_name", WITH_FLOATS)
    def test_values_that_folding_leaves(self, large: Callable[..., Path], format_name: str, name: str) -> None:
        settings = OmniQuantModel(str(large(name)), WeightSpec(3, 32))
        export = open_format(format_name, settings, "float16")
        if format_name == "gguf" and name == NORM:  # llama.cpp has vectors in float32
            export.check_values(settings)
            return
        key = "format" if format_name == "mlc" else "dtype"
        with pytest.raises(ConfigurationError, match=rf"^export\.{key}: {name} {FOUND}.*bfloat16"):
            export.check_values(settings)

    @pytest.mark.parametrize("name", [EMBEDDING, NORM])
    @pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
    def test_values_beyond_the_dtype_that_programs_compute_in(
        self, large: Callable[..., Path], format_name: str, name: str
    ) -> None:
        """The tensor is stored in float32; ``config.json`` says float16, which programs take."""
        folder = large(name, torch.float32)
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
        (folder / "config.json").write_text(json.dumps(config))
        settings = OmniQuantModel(str(folder), WeightSpec(3, 32))
        found = FOUND.replace("70144", "70000")
        with pytest.raises(ConfigurationError, match=rf"^export\.dtype: {name} {found}, the dtype in config.json; "):
            open_format(format_name, settings).check_values(settings)

    def test_values_that_a_transformation_may_change_are_left_for_later(self, large: Callable[..., Path]) -> None:
        settings = OmniQuantModel(str(large(NORM)), WeightSpec(3, 32), transform=TransformSpec())
        open_format("hf", settings, "float16").check_values(settings)

    @pytest.mark.parametrize("format_name", WITH_FLOATS)
    def test_the_command_names_its_own_setting(
        self,
        large: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        token_files: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        format_name: str,
    ) -> None:
        settings = OmniQuantModel(str(large(EMBEDDING)), WeightSpec(3, 32))
        trainer = fit(settings, max_epochs=0)
        monkeypatch.setattr(OmniQuantModel, "folded", lambda *_: pytest.fail("a block was folded"))
        data = CalibrationData(evaluation=[str(token_files[1])])
        key = "format" if format_name == "mlc" else "dtype"
        with pytest.raises(ConfigurationError, match=rf"^{key}: {EMBEDDING} {FOUND}"):
            export_run(trainer, settings, data, format_name, str(tmp_path / "out"), dtype="float16")
        assert not (tmp_path / "out").exists()


class TestWhileItIsWritten:
    @pytest.mark.parametrize("name", [EMBEDDING, NORM])
    @pytest.mark.parametrize("format_name", [*OF_TRANSFORMERS, "packed", "mlc"])
    def test_tensors_that_are_not_quantized(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path, format_name: str, name: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=rf"{name} {FOUND}"):
            exported(large(name), tmp_path / "out", format_name, "float16", finish)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("format_name", "dtype"),
        [("hf", "float16"), ("gptq", "float32"), ("compressed-tensors", None), ("mlc", None)],
    )
    def test_weights_that_programs_dequantize_to_float16(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path, format_name: str, dtype: Any
    ) -> None:
        """Their scales fit: 3 bit, a seventh of the range, which clipping has made a little smaller."""
        key = "dtype" if format_name == "hf" else "format"
        with pytest.raises(
            ConfigurationError, match=rf"^export\.{key}: {WEIGHT} has the value (70144|68880), beyond float"
        ):
            exported(large(WEIGHT), tmp_path / "out", format_name, dtype, finish)

    @pytest.mark.parametrize("format_name", ["packed", "gguf"])
    def test_weights_that_programs_dequantize_to_float32(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path, format_name: str
    ) -> None:
        assert exported(large(WEIGHT), tmp_path / "out", format_name, "float16", finish).is_dir()

    def test_biases_that_gptqmodel_holds_in_float16(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path
    ) -> None:
        folder = large(BIAS, mlp_bias=True)
        with pytest.raises(ConfigurationError, match=rf"^export\.format: {BIAS} {FOUND}.*hf holds it in bfloat16"):
            exported(folder, tmp_path / "out", "gptq", "float32", finish)

    @pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
    def test_values_beyond_the_dtype_that_config_json_says(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path, format_name: str
    ) -> None:
        """A checkpoint stored in float32 whose configuration has programs load it in float16."""
        folder = large(NORM, torch.float32)
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "float16"'))
        with pytest.raises(
            ConfigurationError, match=r"^export\.dtype: .* 65504\), the dtype in config\.json; bfloat16"
        ):
            exported(folder, tmp_path / "out", format_name, None, finish)
        loaded = exported(folder, tmp_path / "out", format_name, "bfloat16", finish) / "model.safetensors"
        assert float(load_file(loaded)[NORM][3]) == 70144

    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
    @pytest.mark.parametrize("format_name", [*OF_TRANSFORMERS, "packed"])
    def test_other_dtypes_hold_them(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path, format_name: str, dtype: Any
    ) -> None:
        folder = exported(large(EMBEDDING), tmp_path / "out", format_name, dtype, finish)
        tensors = load_file(folder / "model.safetensors")
        assert all(bool(found.isfinite().all()) for found in tensors.values() if found.is_floating_point())
        assert float(tensors[EMBEDDING].view(-1)[3]) == 70144

    def test_the_suggested_dtype_computes_the_model(
        self, large: Callable[..., Path], finish: Finish, tmp_path: Path, tokens: Tensor
    ) -> None:
        folder = exported(large(EMBEDDING), tmp_path / "out", "hf", "bfloat16", finish)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert bool(model(tokens).logits.isfinite().all())


@pytest.mark.parametrize("name", [EMBEDDING, NORM, WEIGHT])
@pytest.mark.parametrize("from_folder", [True, False], ids=["loaded", "in memory"])
def test_a_packed_model_is_not_loaded_in_float16(
    large: Callable[..., Path], finish: Finish, tmp_path: Path, name: str, from_folder: bool
) -> None:
    settings = OmniQuantModel(str(large(name)), WeightSpec(3, 32))
    run = finish(settings)

    def load(dtype: torch.dtype) -> torch.nn.Module:
        if from_folder:
            return load_packed(tmp_path / "packed", dtype)
        return open_runnable(settings, run, None, dtype, "cpu")[0]

    if from_folder:
        open_format("packed", settings).write(settings, run, tmp_path / "packed")
    with pytest.raises(
        ConfigurationError, match=rf"^dtype: {name} has the value (70144|68880), .*; bfloat16 holds it$"
    ):
        load(torch.float16)
    assert all(bool(found.isfinite().all()) for found in load(torch.bfloat16).parameters())


class TestFit:
    def test_it_is_refused_before_any_work(
        self, large: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> None:
        model = OmniQuantModel(str(large(EMBEDDING)), WeightSpec(3, 32))
        with pytest.raises(ConfigurationError, match=rf"^export\.dtype: {EMBEDDING} {FOUND}"):
            fit(model, [ExportCallback(dtype="float16")])
        assert not (tmp_path / "run" / "blocks").exists()

    @pytest.mark.parametrize(
        ("format_name", "command"),
        [
            ("hf", "--format hf --dtype bfloat16"),
            ("packed", "--format packed --dtype bfloat16"),
            ("mlc", "--format hf --dtype float32"),
        ],
    )
    def test_what_only_folding_shows_keeps_the_calibration(
        self,
        large: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        tmp_path: Path,
        format_name: Any,
        command: str,
    ) -> None:
        name = "model.layers.0.post_attention_layernorm.weight"
        model = OmniQuantModel(str(large(name)), WeightSpec(3, 32), transform=TransformSpec(initial="ones"))
        run = tmp_path / "run"
        with pytest.raises(ConfigurationError) as caught:
            fit(model, [ExportCallback(format_name, dtype="float16")], max_epochs=0)
        again = f"python train.py export --config {run / 'config.yaml'} {command}"
        assert str(caught.value).endswith(f"; the calibration is kept, export it with {again}")
        assert len(list((run / "blocks").iterdir())) == 2
        assert not (run / "model").exists()
        kind, dtype = command.split()[1::2]
        open_format(kind, model, dtype).write(model, RunFolder(run), tmp_path / "again")  # type: ignore[arg-type]
        assert (tmp_path / "again" / "README.md").is_file()
