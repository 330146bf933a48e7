"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniquant_pl.utils.files import replace_file, write_json, write_tensors, write_text


def test_failing_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]  # noqa: PTH208 (hidden files too)


def test_nothing_appears_before_the_content_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("all of it")
        assert not path.exists()

    replace_file(path, write)
    assert path.read_text() == "all of it"
    assert os.listdir(path.parent) == ["file.txt"]  # noqa: PTH208


def test_failing_tensors_keep_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared})
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["a.safetensors"]  # noqa: PTH208


def test_others_may_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "ä")
    write_json(tmp_path / "b", {})
    write_tensors(tmp_path / "c", {"x": torch.ones(1)})
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "γ ≥ 0\n")
    assert (tmp_path / "a").read_bytes() == "γ ≥ 0\n".encode()


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"z": [1.5], "a": None})
    text = (tmp_path / "a").read_text()
    assert list(json.loads(text).items()) == [("z", [1.5]), ("a", None)]
    assert text.endswith("}\n")


def test_tensors_survive_whatever_their_strides(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    write_tensors(tmp_path / "a", {"t": parameter.t(), "half": torch.ones(2).half()})
    loaded = load_file(tmp_path / "a")
    assert torch.equal(loaded["t"], torch.arange(12.0).view(3, 4).t())
    assert loaded["half"].dtype == torch.float16


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    names = [f"layer.{i}" for i in range(20)]
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate(names)}
    write_tensors(tmp_path / "a", tensors, {"format": "pt"})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
