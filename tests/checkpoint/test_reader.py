"""Safetensors checkpoints, whole and damaged, against the tensors of the model that was saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omniquant_pl.checkpoint import Checkpoint
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import StoredPart

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 6, generator=generator),
        "b.weight": torch.randn(3, generator=generator).bfloat16(),
        "c.ids": torch.arange(5),
    }


@pytest.fixture
def single(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def sharded_llama(make_llama: Callable[..., Path]) -> Path:
    return make_llama(max_shard_size="20KB")


@pytest.fixture
def sharded(sharded_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sharded_llama, tmp_path / "sharded"))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-00001-*"))


def message_of(folder: Path) -> str:
    """What the refusal of a folder says, whether it is found on opening or on reading."""
    with pytest.raises(ConfigurationError, match=r"^model\.path: ") as caught:
        Checkpoint(folder).verify()
    return str(caught.value)


class TestIntact:
    def test_tensors_come_as_they_were_stored(self, single: Path, tensors: dict[str, torch.Tensor]) -> None:
        checkpoint = Checkpoint(single)
        assert checkpoint.names() == ("a.weight", "b.weight", "c.ids")
        assert "a.weight" in checkpoint
        assert "a" not in checkpoint
        for name, tensor in checkpoint:
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])

    def test_order_is_that_of_the_request(self, single: Path) -> None:
        assert list(Checkpoint(single).read(("c.ids", "a.weight"))) == ["c.ids", "a.weight"]

    def test_sizes(self, single: Path) -> None:
        assert [Checkpoint(single).describe(name).elements for name in ("a.weight", "c.ids")] == [24, 5]

    def test_shards_hold_what_one_file_holds(self, sharded: Path, llama: Path) -> None:
        whole, parts = Checkpoint(llama), Checkpoint(sharded)
        assert len(list(sharded.glob("model-*.safetensors"))) > 2
        assert parts.names() == whole.names()
        read = parts.read(whole.names())
        assert all(torch.equal(read[name], tensor) for name, tensor in whole)

    def test_finite_values_pass(self, single: Path, sharded: Path) -> None:
        Checkpoint(single).verify()
        Checkpoint(sharded).verify()


class TestDamaged:
    def test_missing_shard(self, sharded: Path) -> None:
        shard = first_shard(sharded)
        shard.unlink()
        assert shard.name in message_of(sharded)

    @pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99], ids=["empty", "header", "half", "tail"])
    def test_truncated_file(self, single: Path, kept: float) -> None:
        path = single / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
        assert str(path) in message_of(single)

    def test_truncated_shard(self, sharded: Path) -> None:
        shard = first_shard(sharded)
        shard.write_bytes(shard.read_bytes()[:-100])
        assert str(shard) in message_of(sharded)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
    def test_index_that_is_none(self, sharded: Path, content: str) -> None:
        (sharded / INDEX).write_text(content)
        assert str(sharded / INDEX) in message_of(sharded)

    def test_index_that_promises_too_much(self, sharded: Path) -> None:
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"]["no.such.weight"] = first_shard(sharded).name
        (sharded / INDEX).write_text(json.dumps(index))
        message = message_of(sharded)
        assert "no.such.weight" in message
        assert first_shard(sharded).name in message

    def test_no_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        message = message_of(tmp_path)
        assert "model.safetensors" in message
        assert "save_pretrained" in message

    def test_missing_tensor(self, single: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"model\.path: .* has no tensor z\.weight"):
            Checkpoint(single).read(("a.weight", "z.weight"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite(self, tmp_path: Path, dtype: torch.dtype, value: float) -> None:
        bad = torch.zeros(4, 4, dtype=dtype)
        bad[2, 1:3] = value
        save_file({"good": torch.zeros(2), "bad": bad}, tmp_path / "model.safetensors")
        assert "2 values of bad are NaN or infinite" in message_of(tmp_path)


class TestView:
    @pytest.fixture
    def view(self, single: Path) -> Checkpoint:
        parts = {
            "rows": StoredPart("a.weight", (torch.tensor([2, 0]),)),
            "columns": StoredPart("a.weight", (slice(None), slice(4, None))),
            "renamed": StoredPart("b.weight"),
            "absent": StoredPart(None, zeros=(5,)),
        }
        return Checkpoint(single).view(parts)

    def test_tensors_are_what_they_are_made_of(self, view: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["a.weight"]
        expected = {
            "rows": torch.stack((weight[2], weight[0])),
            "columns": weight[:, 4:],
            "renamed": tensors["b.weight"],
            "absent": torch.zeros(5),
        }
        assert view.names() == tuple(sorted(expected))
        torch.testing.assert_close(view.read(tuple(expected)), expected, rtol=0, atol=0)
        for name, tensor in expected.items():
            assert view.describe(name).shape == view.shapes()[name] == tuple(tensor.shape)
            assert view.describe(name).is_float

    def test_what_it_is_made_of_is_not_in_it(self, view: Checkpoint) -> None:
        assert "a.weight" not in view
        with pytest.raises(ConfigurationError, match=r"has no tensor a\.weight"):
            view.read(("a.weight",))

    def test_the_checkpoint_itself_stays_as_it_is(self, single: Path, tensors: dict[str, torch.Tensor]) -> None:
        checkpoint = Checkpoint(single)
        checkpoint.view({"renamed": StoredPart("b.weight")})
        assert checkpoint.names() == tuple(sorted(tensors))
