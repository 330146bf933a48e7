"""Git LFS pointers in the place of a model's files, and of token ids."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from omniquant_pl.checkpoint import Checkpoint, SourceModel
from omniquant_pl.data import CalibrationData, TextSettings
from omniquant_pl.errors import ConfigurationError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2140\nsize 4976698672\n"


@pytest.fixture(scope="module")
def sharded_llama(make_llama: Callable[..., Path]) -> Path:
    return make_llama(max_shard_size="20KB")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-", "model.safetensors"]
)
def test_model(llama: Path, sharded_llama: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(llama if name == "model.safetensors" else sharded_llama, tmp_path / "model"))
    path = next(folder.glob(f"{name}*"))
    path.write_text(POINTER)
    with pytest.raises(ConfigurationError, match=rf"^model\.path: {path} is a Git LFS pointer.*; run git lfs pull"):
        SourceModel(folder)


def test_packed_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(ConfigurationError, match=r"^packed: .* is a Git LFS pointer"):
        Checkpoint(tmp_path, "packed")


def test_token_ids(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_text(POINTER)
    data = CalibrationData(str(tmp_path / "ids.npy"))
    data.bind(TextSettings(None, 16, 64, 0))
    with pytest.raises(ConfigurationError, match=r"^data\.dataset: .*ids\.npy is a Git LFS pointer"):
        data.calibration_tokens()
