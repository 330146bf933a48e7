"""Shards: sizes, names, order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniquant_pl.export.shards import ShardWriter


def write(folder: Path, sizes: list[int], limit: int) -> list[list[str]]:
    """Writes byte tensors of these sizes and returns the names in every file, in order."""
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    writer = ShardWriter(folder, {name: len(tensor) for name, tensor in tensors.items()}, limit)
    writer.add(tensors.items())
    writer.finish()
    files = sorted(folder.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    return [sorted(load_file(file)) for file in files]


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ([4, 4], 8, [["t0", "t1"]]),
        ([4, 5], 8, [["t0"], ["t1"]]),
        ([20, 4], 8, [["t0"], ["t1"]]),
        ([4, 20, 4, 4], 8, [["t0"], ["t1"], ["t2", "t3"]]),
        ([1, 1, 1], 1, [["t0"], ["t1"], ["t2"]]),
    ],
)
def test_tensors_fill_files_in_order(tmp_path: Path, sizes: list[int], limit: int, shards: list[list[str]]) -> None:
    assert write(tmp_path, sizes, limit) == shards
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() is (len(shards) > 1)
    if len(shards) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(sizes)
        count = len(shards)
        assert content["weight_map"] == {
            name: f"model-{number:05d}-of-{count:05d}.safetensors"
            for number, names in enumerate(shards, 1)
            for name in names
        }


def test_a_file_is_written_as_soon_as_it_is_full(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": 8, "b": 8}, 8)
    writer.add([("a", torch.zeros(2))])
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
