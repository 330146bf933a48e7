"""Starting from a run of another model: factors that fit are taken over, with one warning that names both models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.cli.program import run
from omniquant_pl.initialization.run_factors import RunFactors
from omniquant_pl.run.folder import RunFolder

BLOCKS = 2


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of so far."""
    caplog.set_level("WARNING", logger="omniquant_pl")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("omniquant_pl")]


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes what is looked at of the folder of a run: its configuration, and which blocks it has."""

    def run_of(path: str | None, blocks: int = BLOCKS) -> RunFolder:
        folder = RunFolder(tmp_path / "previous")
        folder.blocks.mkdir(parents=True)
        for index in range(blocks):
            folder.factor_file(index).touch()
        if path is not None:
            folder.config.write_text(yaml.safe_dump({"model": {"path": path, "rotation": None}}))
        return folder

    return run_of


def tuned(base: Path, folder: Path) -> Path:
    """A model of the same shapes with other weights, and with another end of text, as a chat variant has."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    return folder


def test_a_tuned_model_starts_from_its_base(
    llama: Path, token_files: tuple[Path, Path], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    calibration, evaluation = token_files
    chat = tuned(llama, tmp_path / "chat")

    def fit(model: Path, name: str, *more: str) -> list[dict[str, Tensor]]:
        options = {
            "model.path": model,
            "data.dataset": calibration,
            "data.samples": 6,
            "data.evaluation": f"[{evaluation}]",
            "trainer.max_epochs": 0,
            "trainer.accelerator": "cpu",
            "trainer.default_root_dir": tmp_path / name,
            "progress.quiet": "true",
        }
        run(["fit", "--config", "w4a4.yaml", *(f"--{key}={value}" for key, value in options.items()), *more])
        return [load_file(path) for path in sorted((tmp_path / name / "blocks").glob("*.safetensors"))]

    base = fit(llama, "base")
    from_itself = fit(llama, "again", f"--model.parameters={tmp_path / 'base'}")
    assert warnings() == []
    from_base = fit(chat, "chat-run", f"--model.parameters={tmp_path / 'base'}")
    assert len(base) == BLOCKS
    for found in (from_itself, from_base):
        torch.testing.assert_close(found, base, rtol=0, atol=0)
    (message,) = warnings()
    assert message.startswith(f"model.parameters: {tmp_path / 'base'} has learned for another model, {llama}, ")
    assert message.endswith(f" of {chat}")
    assert "config.json has another eos_token_id;" in message


class TestSameModel:
    @pytest.mark.parametrize("spelling", ["absolute", "relative", "link"])
    def test_folder(
        self,
        llama: Path,
        run_of: Callable[..., RunFolder],
        warnings: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        spelling: str,
    ) -> None:
        monkeypatch.chdir(llama.parent)
        (tmp_path / "link").symlink_to(llama)
        path = {"absolute": str(llama), "relative": llama.name, "link": str(tmp_path / "link")}[spelling]
        RunFactors(run_of(path), SourceModel(llama))
        assert warnings() == []

    def test_unknown(self, llama: Path, run_of: Callable[..., RunFolder], warnings: Callable[[], list[str]]) -> None:
        """A run that left no configuration, as one from Python code."""
        RunFactors(run_of(None), SourceModel(llama))
        assert warnings() == []


class TestAnotherModel:
    def test_embedded(self, llama: Path, run_of: Callable[..., RunFolder], warnings: Callable[[], list[str]]) -> None:
        RunFactors(run_of("tiny-llama", blocks=4), SourceModel(llama))
        (message,) = warnings()
        assert "another model, tiny-llama, with more than 2 blocks, whose config.json has another " in message
        keys = message.partition("has another ")[2].partition(";")[0].split(", ")
        assert {"hidden_size", "num_hidden_layers", "vocab_size"} <= set(keys)

    def test_gone(self, llama: Path, run_of: Callable[..., RunFolder], warnings: Callable[[], list[str]]) -> None:
        RunFactors(run_of("/gone/model"), SourceModel(llama))
        (message,) = warnings()
        assert message.endswith(f"another model, /gone/model; its factors become the start of {llama}")

    @pytest.mark.parametrize("is_named", [True, False])
    def test_more_blocks(
        self, llama: Path, run_of: Callable[..., RunFolder], warnings: Callable[[], list[str]], is_named: bool
    ) -> None:
        """Even under the same name: what is in the folder may have been replaced."""
        RunFactors(run_of(str(llama) if is_named else None, blocks=BLOCKS + 1), SourceModel(llama))
        (message,) = warnings()
        assert f"another model, {f'{llama}, ' if is_named else ''}with more than 2 blocks; its" in message


class TestHub:
    @pytest.fixture
    def snapshot(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A repository as the hub's client keeps it."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repository = tmp_path / "hub" / "models--owner--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        return Path(shutil.copytree(llama, repository / "snapshots" / "abc"))

    def test_same(self, snapshot: Path, run_of: Callable[..., RunFolder], warnings: Callable[[], list[str]]) -> None:
        RunFactors(run_of("owner/name"), SourceModel(snapshot))
        assert warnings() == []

    @pytest.mark.parametrize("path", ["owner/other", "no such/name"])
    def test_one_that_is_not_here(
        self, snapshot: Path, run_of: Callable[..., RunFolder], warnings: Callable[[], list[str]], path: str
    ) -> None:
        RunFactors(run_of(path), SourceModel(snapshot))
        (message,) = warnings()
        assert f"another model, {path}; its factors become the start of {snapshot}" in message
