"""The export at the end of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniquant_pl.callbacks import ExportCallback
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer


def test_model_folder(llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
    trainer = fit(OmniQuantModel(str(llama)), [ExportCallback()], max_epochs=0)
    names = {path.name for path in (trainer.run_folder.path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names


def test_options_arrive(llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
    export = ExportCallback(dtype="bfloat16", shard_bytes=20_000)
    trainer = fit(OmniQuantModel(str(llama)), [export], max_epochs=0)
    shards = sorted((trainer.run_folder.path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}


def test_null_exports_nothing(llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
    trainer = fit(OmniQuantModel(str(llama)), [ExportCallback(format=None)], max_epochs=0)
    assert not (trainer.run_folder.path / "model").exists()


def test_interrupted_run_exports_nothing(
    llama: Path, fit: Callable[..., SequentialTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fold = "omniquant_pl.callbacks.FoldCallback.on_block_trained"
    monkeypatch.setattr(fold, lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(OmniQuantModel(str(llama)), [ExportCallback()], max_epochs=0)
    assert not (tmp_path / "run" / "model").exists()


def test_what_is_no_export_is_not_replaced(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    """A run that goes on would replace it; one that starts moves it away."""
    path = tmp_path / "run" / "model" / "thesis.txt"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir: .*run/model holds something else"):
        fit(OmniQuantModel(str(llama)), [ExportCallback()], ckpt_path="last", max_epochs=0)
    assert path.read_text() == "mine"
    assert not (tmp_path / "run" / "blocks").exists()
    fit(OmniQuantModel(str(llama)), [ExportCallback()], max_epochs=0)
    assert (tmp_path / "run" / "model-1" / "thesis.txt").read_text() == "mine"


def test_the_original_model_is_not_replaced(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "run" / "model"))
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir: .*run/model is, contains or lies in"):
        fit(OmniQuantModel(str(source)), [ExportCallback()], max_epochs=0)
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_second_fit_replaces_the_first_ones(llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
    for ckpt_path in (None, None, "last"):
        trainer = fit(OmniQuantModel(str(llama)), [ExportCallback()], ckpt_path=ckpt_path, max_epochs=0)
        assert (trainer.run_folder.model / "model.safetensors").is_file()
