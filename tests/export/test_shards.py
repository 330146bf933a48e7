"""Shards: sizes, names, order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omniquant_pl.export.shards import ShardWriter

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def write(folder: Path, sizes: list[int], limit: int) -> list[list[str]]:
    """Writes byte tensors of these sizes and returns the names in every file, in order."""
    tensors = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    writer = ShardWriter(folder, {name: ((len(tensor),), torch.uint8) for name, tensor in tensors.items()}, limit)
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


def test_a_file_is_written_as_it_is_filled(tmp_path: Path) -> None:
    plan = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    writer = ShardWriter(tmp_path, plan, 8)
    writer.add([("a", torch.zeros(2))])
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 5)])
def test_safetensors_reads_every_dtype_and_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The library's reader finds what was written."""
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    tensors = {str(dtype): numbers.to(dtype) for dtype in DTYPES} | {"last": torch.ones(2)}
    writer = ShardWriter(tmp_path, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, 10_000)
    writer.add(tensors.items())
    writer.finish()
    loaded = load_file(tmp_path / "model.safetensors")
    assert {name: t.dtype for name, t in loaded.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_transposed_tensors_are_stored_as_they_look(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5).T
    writer = ShardWriter(tmp_path, {"x": ((5, 3), torch.float32)}, 1000)
    writer.add([("x", tensor)])
    writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], tensor)


@pytest.mark.parametrize(
    "tensors",
    [[("b", torch.zeros(2))], [("a", torch.zeros(3))], [("a", torch.zeros(2).half())], [("a", torch.zeros(1, 2))]],
    ids=["order", "size", "dtype", "shape"],
)
def test_what_was_not_planned_is_refused(tmp_path: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    writer = ShardWriter(tmp_path, {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}, 1000)
    with pytest.raises(ValueError, match="planned"):
        writer.add(tensors)


def test_what_has_not_come_is_noticed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}, 1000)
    writer.add([("a", torch.zeros(2))])
    with pytest.raises(ValueError, match="b was planned"):
        writer.finish()
