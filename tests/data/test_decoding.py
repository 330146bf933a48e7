"""Text that is not clean, in every form of a dataset: decoded as it was meant, or refused by file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from omniquant_pl.data.decoding import whole_text
from omniquant_pl.data.sources import read_text
from omniquant_pl.errors import ConfigurationError

TEXT = "one é\ntwo 漢字 🙂\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
"""Those of Python that write a mark, apart from the first."""
MARKED = [("utf-16-be", b"\xfe\xff"), ("utf-32-be", b"\0\0\xfe\xff"), ("utf-16-le", b"\xff\xfe")]

Write = Callable[[Path, list[Any]], Path]


def as_jsonl(folder: Path, rows: list[Any]) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder / "a.jsonl"


def as_parquet(folder: Path, rows: list[Any]) -> Path:
    parquet.write_table(pa.table({"text": rows}), folder / "a.parquet")
    return folder / "a.parquet"


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_text(str(path), "calibration")
    message = str(caught.value)
    assert message.startswith("data.dataset: ")
    assert path.name in message
    assert "\n" not in message
    return message


class TestMarks:
    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_txt(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "a.txt").write_text(TEXT, encoding=encoding)
        assert read_text(str(tmp_path / "a.txt"), "calibration").stream() == TEXT

    @pytest.mark.parametrize(("encoding", "mark"), MARKED)
    def test_txt_of_a_byte_order(self, tmp_path: Path, encoding: str, mark: bytes) -> None:
        (tmp_path / "a.txt").write_bytes(mark + TEXT.encode(encoding))
        assert read_text(str(tmp_path / "a.txt"), "calibration").stream() == TEXT

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_jsonl(self, tmp_path: Path, encoding: str) -> None:
        rows = ["one é", "two\u2028漢字 🙂"]
        lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\r\n" for row in rows)
        (tmp_path / "a.jsonl").write_text(lines, encoding=encoding, newline="")
        assert list(read_text(str(tmp_path / "a.jsonl"), "calibration").documents) == rows

    def test_jsonl_files_put_together(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(2 * '{"text": "é"}\n'.encode("utf-8-sig"))
        assert list(read_text(str(tmp_path / "a.jsonl"), "calibration").documents) == ["é", "é"]

    def test_other_line_ends(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
        assert read_text(str(tmp_path / "a.txt"), "calibration").stream() == "one\ntwo\nthree\n"


class TestBytes:
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_not_utf8(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes('{"text": "é"}\n{"text": "ü"}\n'.encode() + '{"text": "é"}\n'.encode("latin-1"))
        message = refusal(tmp_path / name)
        assert "line 3 is not utf-8 (byte 0xe9" in message
        assert "save it as UTF-8" in message

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_half_a_character_of_utf16(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes("one\ntwo".encode("utf-16") + b"x")
        assert "line 2 is not utf-16-le" in refusal(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    @pytest.mark.parametrize("content", [b"one\ntw\0o", "one\ntwo".encode("utf-16-be")], ids=["one", "utf-16"])
    def test_nul(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        assert "holds NUL" in refusal(tmp_path / name)
        assert f"line {1 if content.startswith(bytes(1)) else 2} " in refusal(tmp_path / name)

    def test_parquet_of_bytes(self, tmp_path: Path) -> None:
        path = as_parquet(tmp_path, [row.encode() for row in ("one é", "two 🙂")])
        assert list(read_text(str(path), "calibration").documents) == ["one é", "two 🙂"]

    def test_parquet_of_other_bytes(self, tmp_path: Path) -> None:
        path = as_parquet(tmp_path, [b"one", "é".encode("latin-1")])
        assert "has bytes that are not UTF-8 (byte 1: unexpected end of data) in column 'text', row 1" in refusal(path)

    def test_parquet_of_strings_that_are_not_utf8(self, tmp_path: Path) -> None:
        column = pa.array([b"one", b"two\xff"]).view(pa.string())
        parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert "has bytes that are not UTF-8 (byte 4" in refusal(tmp_path / "a.parquet")
        assert "row 1" in refusal(tmp_path / "a.parquet")

    def test_hub_of_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = datasets.Dataset.from_dict({"text": [b"one", "é".encode()]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": rows}))
        assert read_text("user/corpus", "calibration").stream() == "one\n\né"


class TestSurrogates:
    @pytest.mark.parametrize(
        ("escapes", "half"),
        [(r"a\ud83d", "U+D83D"), (r"a\ude42", "U+DE42"), (r"a\ud83d\u0041", "U+D83D"), (r"a\ude42\ud83d", "U+DE42")],
    )
    def test_half_in_json(self, tmp_path: Path, escapes: str, half: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "' + escapes + '"}\n')
        message = refusal(tmp_path / "a.jsonl")
        assert f"line 2, has half a surrogate pair, {half}, as character 2 in column 'text'" in message

    def test_pair_in_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d\ude42b"}')
        assert read_text(str(tmp_path / "a.jsonl"), "calibration").stream() == "a🙂b"

    def test_pair_of_python(self) -> None:
        assert whole_text("a\ud83d\ude42b") == "a🙂b"

    def test_place_behind_long_characters(self) -> None:
        with pytest.raises(ValueError, match=r"half a surrogate pair, U\+D83D, as character 4$"):
            whole_text("🙂é\ud83d\ude42\ud83d")

    def test_encoded_half(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("one\n\ud83d".encode("utf-8", "surrogatepass"))
        assert "line 2 is not utf-8 (byte 0xed" in refusal(tmp_path / "a.txt")


class TestRows:
    @pytest.mark.parametrize("write", [as_jsonl, as_parquet])
    def test_empty_rows_stay(self, tmp_path: Path, write: Write) -> None:
        assert list(read_text(str(write(tmp_path, ["", "one", " "])), "evaluation").documents) == ["", "one", " "]

    @pytest.mark.parametrize(("write", "row"), [(as_jsonl, "line 2"), (as_parquet, "row 1")])
    def test_null(self, tmp_path: Path, write: Write, row: str) -> None:
        message = refusal(write(tmp_path, ["one", None]))
        assert "has None in column 'text'" in message
        assert row in message

    @pytest.mark.parametrize("rows", [[], [""], ["", " \n"]])
    @pytest.mark.parametrize("write", [as_jsonl, as_parquet])
    def test_no_text_at_all(self, tmp_path: Path, write: Write, rows: list[str]) -> None:
        parquet_of_none = write is as_parquet and not rows
        path = write(tmp_path, pa.array([], pa.string()) if parquet_of_none else rows)
        assert f"holds no text in {len(rows)} rows" in refusal(path)

    @pytest.mark.parametrize("content", [b"", b" \n", "\ufeff".encode()])
    def test_no_text_in_txt(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.txt").write_bytes(content)
        assert "holds no text" in refusal(tmp_path / "a.txt")

    @pytest.mark.parametrize(
        "line", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": "a\tb"}'], ids=["deep", "long", "control"]
    )
    def test_json_that_python_refuses(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
        assert "line 2, is not JSON" in refusal(tmp_path / "a.jsonl")
