"""Which files hold the weights: those that transformers loads; and what a folder holds that is none of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniquant_pl.checkpoint import Checkpoint, SourceModel
from omniquant_pl.errors import ConfigurationError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.0.mlp.down_proj.weight"


def message_of(folder: Path) -> str:
    with pytest.raises(ConfigurationError, match=r"^model\.path: ") as caught:
        SourceModel(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def opens_as_transformers(folder: Path, logits_of: Callable[..., Tensor], tokens: Tensor) -> None:
    source = SourceModel(folder)
    calls, hidden = source.calls(tokens.shape[1]), source.embed(tokens)
    for index, call in enumerate(calls):
        hidden = call(source.make_block(index, source.block_tensors(index)), hidden)
    torch.testing.assert_close(source.logits(hidden), logits_of(folder, tokens), rtol=0, atol=1e-6)


@pytest.fixture
def both(make_llama: Callable[..., Path]) -> Path:
    """One file, and the shards of another model with their index."""
    folder = make_llama(max_shard_size="20KB")
    tensors = {name: tensor for shard in folder.glob("model-*") for name, tensor in load_file(shard).items()}
    save_file({name: -tensor for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    return folder


class TestOneFileGoesBeforeAnIndex:
    def test_it_is_read_and_a_warning_says_what_is_not(
        self, both: Path, logits_of: Callable[..., Tensor], tokens: Tensor, caplog: pytest.LogCaptureFixture
    ) -> None:
        opens_as_transformers(both, logits_of, tokens)
        (record,) = [record for record in caplog.records if record.name == "omniquant_pl.checkpoint.weight_files"]
        assert record.levelno == logging.WARNING
        assert (
            record.getMessage() == f"{both / SINGLE} is read, as transformers does; {INDEX} and its shards are ignored"
        )

    def test_an_index_of_missing_shards_does_not_matter(
        self, both: Path, logits_of: Callable[..., Tensor], tokens: Tensor
    ) -> None:
        for shard in both.glob("model-*.safetensors"):
            shard.unlink()
        opens_as_transformers(both, logits_of, tokens)

    def test_nor_does_one_that_is_none(self, both: Path, logits_of: Callable[..., Tensor], tokens: Tensor) -> None:
        (both / INDEX).write_text("{")
        opens_as_transformers(both, logits_of, tokens)

    def test_a_damaged_file_is_not_made_up_for(self, both: Path) -> None:
        (both / SINGLE).write_bytes(b"damaged")
        assert f"{both / SINGLE} cannot be read" in message_of(both)


class TestShards:
    @pytest.fixture
    def shards(self, make_llama: Callable[..., Path]) -> Path:
        return make_llama(max_shard_size="20KB", tie_word_embeddings=False)

    def test_what_is_in_them_counts(self, shards: Path, logits_of: Callable[..., Tensor], tokens: Tensor) -> None:
        """An index that does not name a tensor, or names another shard for it."""
        content = json.loads((shards / INDEX).read_text())
        where = content["weight_map"].pop(GATE)
        (shards / INDEX).write_text(json.dumps(content))
        assert where in content["weight_map"].values()
        opens_as_transformers(shards, logits_of, tokens)
        content["weight_map"][GATE] = max(set(content["weight_map"].values()) - {where})
        (shards / INDEX).write_text(json.dumps(content))
        opens_as_transformers(shards, logits_of, tokens)

    def test_of_two_tensors_of_a_name_the_later_file_counts(
        self, shards: Path, logits_of: Callable[..., Tensor], tokens: Tensor
    ) -> None:
        last = max(shards.glob("model-*.safetensors"))
        first = min(shards.glob("model-*.safetensors"))
        tensors = load_file(first)
        save_file(load_file(last) | {name: -tensor for name, tensor in tensors.items()}, last, {"format": "pt"})
        opens_as_transformers(shards, logits_of, tokens)
        name = next(iter(tensors))
        assert torch.equal(Checkpoint(shards).read((name,))[name], -tensors[name])


class TestTransformersWeights:
    """``transformers_weights`` of config.json names the file."""

    def test_is_read(self, both: Path, logits_of: Callable[..., Tensor], tokens: Tensor) -> None:
        (both / SINGLE).rename(both / "other.safetensors")
        self.name(both, "other.safetensors")
        opens_as_transformers(both, logits_of, tokens)
        assert "transformers_weights" not in SourceModel(both).config_json  # an export has the usual names

    def test_an_index(self, both: Path, logits_of: Callable[..., Tensor], tokens: Tensor) -> None:
        self.name(both, INDEX)
        opens_as_transformers(both, logits_of, tokens)

    @pytest.mark.parametrize("value", ["no-such.safetensors", "../model.safetensors", "config.json", 3])
    def test_no_such_file(self, both: Path, value: object) -> None:
        self.name(both, value)
        assert f"transformers_weights is {value!r}, which is neither" in message_of(both)

    @staticmethod
    def name(folder: Path, value: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": value}))


class TestNone:
    """No file that transformers reads: what is there is said, and what to do."""

    @pytest.fixture
    def empty(self, llama: Path, tmp_path: Path) -> Path:
        shutil.copyfile(llama / "config.json", tmp_path / "config.json")
        return tmp_path

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["consolidated.safetensors"], "consolidated.safetensors, safetensors under Mistral's own names"),
            (["consolidated-00001-of-00002.safetensors"], "safetensors under Mistral's own names"),
            (
                ["pytorch_model.safetensors"],
                "under another name; if they are the model's weights, rename it to model.s",
            ),
            (["model-00001-of-00003.safetensors"], "1 of 3 shards .* without their index; fetch model.safetensors.ind"),
            (["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], "2 of 2 shards .* without their index"),
            (["adapter_model.safetensors"], "an adapter; merge it into its model with peft's merge_and_unload"),
            (["pytorch_model.bin"], "pytorch_model.bin; pickled weights are not read: .* save_pretrained"),
            (["pytorch_model-00001-of-00002.bin"], "pickled weights are not read"),
            (["consolidated.00.pth"], "pickled weights are not read"),
            (["model-Q4_K.gguf"], "model-Q4_K.gguf, a file for llama.cpp; give the original checkpoint"),
            ([], "it holds no weights; give a folder that transformers' save_pretrained has written"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) and value else "",
    )
    def test_what_there_is(self, empty: Path, llama: Path, names: list[str], expected: str) -> None:
        for name in names:
            shutil.copyfile(llama / SINGLE, empty / name)
        with pytest.raises(ConfigurationError, match=expected) as caught:
            SourceModel(empty)
        assert f"{empty} holds neither {SINGLE} nor {INDEX}; it holds " in str(caught.value)
        assert ("pickled" in str(caught.value)) == any(name.endswith((".bin", ".pth")) for name in names)
