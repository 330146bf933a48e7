"""``config.yaml`` of a run is a configuration: for the same run again, and for its test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError

Command = Callable[..., Path]


@pytest.fixture
def fit_w3(llama: Path, token_files: tuple[Path, Path], tmp_path: Path) -> Command:
    """Runs ``fit`` with the preset w3a16 on tiny things and returns the run folder."""
    calibration, evaluation = token_files

    def fit(root: str = "run", *more: str, config: str = "w3a16.yaml") -> Path:
        options = {
            "model.path": llama,
            "data.dataset": calibration,
            "data.samples": 6,
            "data.evaluation": f"[{evaluation}]",
            "trainer.max_epochs": 1,
            "trainer.accelerator": "cpu",
            "progress.quiet": "true",
        }
        preset = config == "w3a16.yaml"
        arguments = [f"--{k}={v}" for k, v in options.items()] if preset else []
        folder = tmp_path / root
        run(["fit", f"--config={config}", *arguments, f"--trainer.default_root_dir={folder}", *more])
        return folder

    return fit


def content(root: Path) -> dict[str, bytes]:
    files = [*root.glob("blocks/*"), *root.glob("model/*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_is_resolved(fit_w3: Command, llama: Path) -> None:
    config = yaml.safe_load((fit_w3() / "config.yaml").read_text())
    assert config["seed_everything"] == 2
    assert config["model"]["path"] == str(llama)
    expected = {"bits": 3, "group_size": None, "symmetric": False, "scale_dtype": "float16", "bits_of": {}}
    assert config["model"]["weights"] == expected
    assert config["model"]["activations"] is None
    assert config["trainer"]["max_epochs"] == 1
    assert config["data"]["batch_size"] == 1  # not in the preset


def test_fits_the_same_model_again(fit_w3: Command) -> None:
    first = fit_w3("first")
    second = fit_w3("second", config=str(first / "config.yaml"))
    assert {"blocks/00001.safetensors", "model/model.safetensors", "model/README.md"} <= set(content(first))
    assert content(first) == content(second)
    again = fit_w3("first", config=str(first / "config.yaml"))
    assert content(again) == content(second)
    texts = [(folder / "config.yaml").read_text() for folder in (first, second)]
    assert texts[0].replace(str(first), str(second)) == texts[1]


def test_serves_the_test_command(fit_w3: Command, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit_w3()
    before = json.loads((folder / "metrics.json").read_text())
    capsys.readouterr()
    run(["test", "--config", str(folder / "config.yaml")])
    after = json.loads((folder / "metrics.json").read_text())
    assert after == before
    out = capsys.readouterr().out
    for value in after["perplexity"]["evaluation"].values():
        assert f"{value:.3f}" in out


def test_other_evaluation_set_is_added(fit_w3: Command, token_files: tuple[Path, Path]) -> None:
    folder = fit_w3()
    evaluation = f"--data.evaluation=[{token_files[0]}]"
    run(["test", "--config", str(folder / "config.yaml"), evaluation])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["perplexity"]) == {"evaluation", "calibration"}
    assert len(metrics["blocks"]) == 2


class TestRelativePath:
    @pytest.fixture
    def fitted(self, fit_w3: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run that was started beside its model, and a working folder elsewhere."""
        shutil.copytree(llama, tmp_path / "here" / "model")
        monkeypatch.chdir(tmp_path / "here")
        folder = fit_w3("run", "--model.path=model")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        return folder

    def test_is_found_from_any_folder(self, fitted: Path) -> None:
        run(["export", f"--config={fitted}/config.yaml", "--format=packed"])
        assert (fitted / "packed" / "config.json").is_file()
        run(["test", f"--config={fitted}/config.yaml"])

    def test_is_the_same_as_the_absolute_one(
        self, fitted: Path, fit_w3: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The run goes on whichever way the model is named."""
        before = content(fitted)
        monkeypatch.chdir(fitted.parent / "here")
        fit_w3("run", "--model.path=model")
        fit_w3("run", f"--model.path={fitted.parent / 'here' / 'model'}")
        assert content(fitted) == before
        with pytest.raises(ConfigurationError, match=r"holds a run with another model\.path"):
            fit_w3("run", "--model.path=../here")
