"""Tokens that are kept: those that the tokenizer gives, whatever lies in the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omniquant_pl.data import cache
from omniquant_pl.data.cache import encode_stream
from omniquant_pl.data.text import Text

TEXT = Text(["w3 w1 w4", "w1 w5"], identity="pi")


def make_tokenizer(offset: int = 0, kind: Any = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Word wi is number i + offset."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i + offset for i in range(9)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return kind(tokenizer_object=backend, unk_token="w0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "_file", lambda name: tmp_path / name)
    return tmp_path


def never(tokenizer: object, text: str) -> torch.Tensor:
    raise AssertionError("the text is tokenized again")


def test_a_text_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_stream(make_tokenizer(), TEXT)
    assert first.tolist() == [3, 1, 4, 1, 5]
    monkeypatch.setattr(cache, "encode", never)
    second = encode_stream(make_tokenizer(), TEXT)
    assert torch.equal(second, first)
    assert second.dtype == torch.int64


def test_a_text_that_is_known_is_not_read() -> None:
    class Unread(list[str]):
        def __iter__(self) -> None:  # type: ignore[override]
            raise AssertionError("the text is read")

    encode_stream(make_tokenizer(), Text(["w2 w2"], identity="twos"))
    assert encode_stream(make_tokenizer(), Text(Unread(), identity="twos")).tolist() == [2, 2]


def test_other_texts_and_other_tokenizers_have_their_own() -> None:
    encode_stream(make_tokenizer(), TEXT)
    assert encode_stream(make_tokenizer(), Text(["w3 w1 w4"], identity="three")).tolist() == [3, 1, 4]
    assert encode_stream(make_tokenizer(offset=1), TEXT).tolist() == [4, 2, 5, 2, 6]


def test_a_text_without_identity_is_not_kept(folder: Path) -> None:
    assert encode_stream(make_tokenizer(), Text(["w3", "w7"])).tolist() == [3, 7]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("place", range(0, 52, 3))
def test_a_flipped_bit_is_noticed(folder: Path, place: int) -> None:
    encode_stream(make_tokenizer(), TEXT)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    assert len(whole) == 32 + 4 * 5  # a digest, and the ids of TEXT
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    assert encode_stream(make_tokenizer(), TEXT).tolist() == [3, 1, 4, 1, 5]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("size", [0, 1, 32, 36])
def test_a_file_that_was_cut_is_replaced(folder: Path, size: int) -> None:
    encode_stream(make_tokenizer(), TEXT)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert encode_stream(make_tokenizer(), TEXT).tolist() == [3, 1, 4, 1, 5]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("error", [PermissionError("read-only"), ValueError("a file stands in the way")])
def test_no_place_to_keep_them(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(name: str) -> Path:
        raise error

    monkeypatch.setattr(cache, "_file", refuse)
    assert encode_stream(make_tokenizer(), TEXT).tolist() == [3, 1, 4, 1, 5]


class OwnCode(PreTrainedTokenizerFast):
    """May do anything."""


def test_what_is_code_of_its_own_is_not_kept(folder: Path) -> None:
    assert encode_stream(make_tokenizer(kind=OwnCode), TEXT).tolist() == [3, 1, 4, 1, 5]
    assert not list(folder.iterdir())


class Spaces:
    """A part of a tokenizer that is written in Python."""

    def pre_tokenize(self, pretok: Any) -> None:
        pretok.split(lambda _, words: words.split(" ", "removed"))


def test_what_cannot_be_written_down_is_not_kept(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Spaces())
    assert encode_stream(tokenizer, TEXT).tolist()[:3] == [3, 1, 0]  # an empty line is no space here
    assert not list(folder.iterdir())


def test_where_they_are_kept(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = assets / "omniquant_pl" / "tokens" / "streams"
    before = set(folder.glob("*"))
    encode_stream(make_tokenizer(), Text(["w8 w8"], identity="eights"))
    assert len(set(folder.glob("*")) - before) == 1
