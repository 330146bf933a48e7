"""Tokens that are kept: those that the tokenizer gives, whatever lies in the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omniquant_pl.data import cache
from omniquant_pl.data.cache import encode_stream
from omniquant_pl.data.text import Text

TEXT = Text(["w3 w1 w4", "w1 w5"])


def make_tokenizer(offset: int = 0, kind: Any = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Word wi is number i + offset."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i + offset for i in range(9)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return kind(tokenizer_object=backend, unk_token="w0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "_folder", lambda: tmp_path)
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
    assert encode_stream(make_tokenizer(), Text(["w3 w1 w4"])).tolist() == [3, 1, 4]
    assert encode_stream(make_tokenizer(offset=1), TEXT).tolist() == [4, 2, 5, 2, 6]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """Another token, as a disk may make of it."""
    place = content.index(b"\x03\x00\x00\x00\x01\x00\x00\x00\x04\x00\x00\x00\x01")  # the ids of TEXT
    return content[:place] + b"\x07" + content[place + 1 :]


def nothing(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flip, nothing])
def test_a_damaged_file_is_replaced(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    encode_stream(make_tokenizer(), TEXT)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert encode_stream(make_tokenizer(), TEXT).tolist() == [3, 1, 4, 1, 5]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("error", [PermissionError("read-only"), ValueError("a file stands in the way")])
def test_no_place_to_keep_them(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse() -> Path:
        raise error

    monkeypatch.setattr(cache, "_folder", refuse)
    assert encode_stream(make_tokenizer(), TEXT).tolist() == [3, 1, 4, 1, 5]


class OwnCode(PreTrainedTokenizerFast):
    """May do anything."""


def test_what_is_code_of_its_own_is_not_kept(folder: Path) -> None:
    assert encode_stream(make_tokenizer(kind=OwnCode), TEXT).tolist() == [3, 1, 4, 1, 5]
    assert not list(folder.iterdir())


def test_where_they_are_kept(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    encode_stream(make_tokenizer(), Text(["w8 w8"]))
    assert list((assets / "omniquant_pl" / "tokens" / "streams").glob("*.npz"))
