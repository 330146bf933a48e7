"""The factors alone: with the original they make the calibrated model again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import Verification, open_format
from omniquant_pl.initialization.factor_file import FactorFile, write_factor_file
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import ActivationSpec, RotationSpec, RoundingSpec, TransformSpec, WeightSpec
from omniquant_pl.utils.sealed import read_sealed

Finish = Callable[[OmniQuantModel], RunFolder]


@pytest.fixture
def fit(llama: Path, token_files: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    def fit(name: str, *more: str) -> Path:
        calibration, evaluation = token_files
        data = [f"--data.dataset={calibration}", "--data.samples=6", f"--data.evaluation=[{evaluation}]"]
        trainer = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path / name}"]
        run(["fit", *more, f"--model.path={llama}", *data, *trainer, "--progress.quiet=true"])
        return tmp_path / name

    return fit


@pytest.mark.parametrize(
    ("preset", "given"),
    [("w4a4.yaml", "factors.safetensors"), ("w3a16.yaml", ""), ("beyond/rotation.yaml", "factors.safetensors")],
)
def test_no_epoch_from_it_is_the_same_model(fit: Callable[..., Path], tmp_path: Path, preset: str, given: str) -> None:
    """From the file, or the folder that it is in."""
    first = fit("first", f"--config={preset}", "--trainer.max_epochs=2")
    zoo = tmp_path / "zoo"
    run(["export", f"--config={first / 'config.yaml'}", "--format=factors", f"--output={zoo}"])
    assert {path.name for path in zoo.iterdir()} == {"factors.safetensors", "factors.yaml", "README.md"}
    again = fit("again", f"--config={zoo / 'factors.yaml'}", f"--model.parameters={zoo / given}")
    assert (again / "model" / "model.safetensors").read_bytes() == (first / "model" / "model.safetensors").read_bytes()
    upper = load_file(again / "blocks" / "00000.safetensors")["self_attn.q_proj.clip.upper"]
    assert not torch.equal(upper, torch.full_like(upper, 4.0))  # where learning starts


def test_what_it_says(llama: Path, finish: Finish, tmp_path: Path) -> None:
    model = OmniQuantModel(str(llama), WeightSpec(3, 16), ActivationSpec(8))
    run_folder = finish(model)
    open_format("factors", model).write(model, run_folder, tmp_path / "out")
    tensors, content = read_sealed(tmp_path / "out" / "factors.safetensors")
    assert content is not None
    assert (content["model"], content["scheme"], content["blocks"]) == (str(llama), "w3a8g16", 2)
    for index in range(2):
        for name, factor in run_folder.load_factors(index).items():
            assert torch.equal(tensors[f"{index}.{name}"], factor)
    section = yaml.safe_load((tmp_path / "out" / "factors.yaml").read_text())["model"]
    assert (section["weights"]["bits"], section["weights"]["group_size"]) == (3, 16)
    assert section["activations"]["bits"] == 8
    assert "library_name: omniquant-pl" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("rounding", ["learned", "gptq"])
def test_codes_that_do_not_follow_from_factors_are_refused(llama: Path, rounding: Any) -> None:
    model = OmniQuantModel(str(llama), rounding=RoundingSpec(rounding))
    with pytest.raises(ConfigurationError, match=f"factors cannot hold .* model.rounding.method {rounding}"):
        open_format("factors", model)


def test_nothing_computes_with_it_alone(llama: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"verify: no program computes with factors alone"):
        Verification(open_format("factors", OmniQuantModel(str(llama))), torch.zeros(1, 1, dtype=torch.long))


class TestFactorFile:
    @pytest.fixture
    def path(self, llama: Path, finish: Finish, tmp_path: Path) -> Path:
        model = OmniQuantModel(str(llama), WeightSpec(3))
        write_factor_file(tmp_path / "zoo.safetensors", finish(model), model.source, {"model": "a/base"})
        return tmp_path / "zoo.safetensors"

    def open(self, path: Path, model: Path, **settings: Any) -> FactorFile:
        return FactorFile(path, SourceModel(model, **settings))

    def test_another_model_is_warned_of(
        self, path: Path, make_llama: Callable[..., Path], caplog: pytest.LogCaptureFixture, llama: Path
    ) -> None:
        with caplog.at_level("WARNING", "omniquant_pl"):
            self.open(path, llama)
            assert caplog.messages == []
            self.open(path, make_llama(initializer_range=0.1))
        assert "has learned for another model, a/base; its factors" in caplog.messages[0]

    def test_another_depth(self, path: Path, make_llama: Callable[..., Path]) -> None:
        with pytest.raises(ConfigurationError, match=r"has factors of 2 blocks, the model has 3"):
            self.open(path, make_llama(num_hidden_layers=3))

    def test_another_rotation(self, path: Path, llama: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"has learned for another model\.rotation, None"):
            self.open(path, llama, rotation=RotationSpec())

    def test_other_settings(self, path: Path, llama: Path) -> None:
        model = OmniQuantModel(str(llama), WeightSpec(3), transform=TransformSpec(), parameters=str(path))
        with pytest.raises(ConfigurationError, match=r"block 0, does not fit these settings: "):
            model.verify()

    def test_missing(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"model\.parameters: there is no file"):
            self.open(tmp_path / "gone.safetensors", llama)

    def test_damaged(self, path: Path, llama: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"model\.parameters: .*checksum"):
            self.open(path, llama)

    def test_other_tensors(self, llama: Path, tmp_path: Path) -> None:
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigurationError, match=r"holds no factors; python train.py export --format factors"):
            self.open(tmp_path / "model.safetensors", llama)
