"""Reading text by name: the hub is a recorder that hands out small real datasets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from hub_stand_in import hub_stand_in
from omniquant_pl.data.builtin import builtin_text
from omniquant_pl.data.sources import dataset_key, is_path, read_text
from omniquant_pl.data.text import Role
from omniquant_pl.errors import ConfigurationError


class Hub:
    """Stands in for ``datasets.load_dataset``: records its calls, returns what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answer: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    recorder = Hub()
    monkeypatch.setattr(datasets, "load_dataset", recorder)
    monkeypatch.setattr("omniquant_pl.checkpoint.hub._silence", lambda: None)
    monkeypatch.chdir(tmp_path)  # no file here is called like a dataset
    return recorder


def rows(texts: list[Any], column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: texts, "other": list(range(len(texts)))})


class TestNames:
    @pytest.mark.parametrize("name", ["a.txt", "b/c.jsonl", "x.parquet", "t.npy", "T.NPY", "/x", "./y", "~/z"])
    def test_paths(self, name: str) -> None:
        assert is_path(name)

    @pytest.mark.parametrize("name", ["builtin", "wikitext2", "c4", "ptb", "pile", "user/data"])
    def test_names(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert not is_path(name)
        assert dataset_key(name) == name

    def test_known_names_win_over_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "c4").mkdir()
        monkeypatch.chdir(tmp_path)
        assert not is_path("c4")

    def test_a_thing_that_exists_is_a_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "notes").write_text("x")
        monkeypatch.chdir(tmp_path)
        assert is_path("notes")

    def test_key_of_a_path_is_its_stem(self) -> None:
        assert dataset_key("some/folder/evaluation.npy") == "evaluation"


class TestHub:
    @pytest.mark.parametrize(("role", "split"), [("calibration", "train"), ("evaluation", "test")])
    def test_wikitext2(self, hub: Hub, role: Role, split: str) -> None:
        hub.answer = rows(["", " = Title = \n", "text"])
        text = read_text("wikitext2", role)
        options = {"name": "wikitext-2-raw-v1", "split": split}
        assert hub.calls == [(("Salesforce/wikitext",), options)]
        assert not text.within_documents
        assert text.stream() == "\n\n = Title = \n\n\ntext"

    @pytest.mark.parametrize(
        ("role", "split", "file"),
        [
            ("calibration", "train", "en/c4-train.00000-of-01024.json.gz"),
            ("evaluation", "validation", "en/c4-validation.00000-of-00008.json.gz"),
        ],
    )
    def test_c4(self, hub: Hub, role: Role, split: str, file: str) -> None:
        hub.answer = rows(["one", "two"])
        text = read_text("c4", role)
        assert hub.calls == [(("allenai/c4",), {"data_files": {split: file}, "split": split})]
        assert text.within_documents
        assert [text.documents[i] for i in range(len(text.documents))] == ["one", "two"]

    @pytest.mark.parametrize(("role", "split"), [("calibration", "train"), ("evaluation", "validation")])
    def test_ptb(self, hub: Hub, role: Role, split: str) -> None:
        hub.answer = rows(["a b", "c"], "sentence")
        text = read_text("ptb", role)
        options = {
            "data_files": {split: f"penn_treebank/{split}/*.parquet"},
            "revision": "refs/convert/parquet",
            "split": split,
        }
        assert hub.calls == [(("ptb-text-only/ptb_text_only",), options)]
        assert text.stream() == "a b\n\nc"

    @pytest.mark.parametrize(("role", "first", "last"), [("calibration", 0, 999), ("evaluation", 1000, 1999)])
    def test_pile(self, hub: Hub, role: Role, first: int, last: int) -> None:
        hub.answer = rows([f"text {i}" for i in range(2500)])
        text = read_text("pile", role)
        assert hub.calls == [(("mit-han-lab/pile-val-backup",), {"split": "validation"})]
        assert len(text.documents) == 1000
        assert (text.documents[0], text.documents[-1]) == (f"text {first}", f"text {last}")

    @pytest.mark.parametrize(
        ("role", "splits", "expected"),
        [
            ("calibration", ["train", "test"], "train"),
            ("evaluation", ["train", "validation", "test"], "test"),
            ("evaluation", ["train", "validation"], "validation"),
        ],
    )
    def test_any_other_id(self, hub: Hub, role: Role, splits: list[str], expected: str) -> None:
        hub.answer = datasets.DatasetDict({split: rows([split, "end"]) for split in splits})
        text = read_text("user/corpus", role)
        assert hub.calls == [(("user/corpus",), {})]
        assert text.stream() == f"{expected}\n\nend"


class TestHubErrors:
    @pytest.mark.parametrize(("role", "key"), [("calibration", "data.dataset"), ("evaluation", "data.evaluation")])
    def test_no_such_column(self, hub: Hub, role: Role, key: str) -> None:
        hub.answer = datasets.DatasetDict({"train": rows(["x"], "body"), "test": rows(["x"], "body")})
        with pytest.raises(ConfigurationError, match=r"'user/corpus'.*'text'.*body, other") as caught:
            read_text("user/corpus", role)
        assert caught.value.key == key

    def test_no_such_split(self, hub: Hub) -> None:
        hub.answer = datasets.DatasetDict({"train": rows(["x"])})
        with pytest.raises(ConfigurationError, match=r"no split test or validation.*train"):
            read_text("user/corpus", "evaluation")

    def test_missing_text(self, hub: Hub) -> None:
        hub.answer = datasets.DatasetDict({"train": rows(["x", None])})
        with pytest.raises(ConfigurationError, match="has None in column 'text', row 1"):
            read_text("user/corpus", "calibration")

    @pytest.mark.parametrize(
        "failure",
        [
            ConnectionError("offline"),
            datasets.exceptions.DatasetNotFoundError("gone"),
            datasets.exceptions.DatasetGenerationError("bad file"),
            ValueError("Config name is missing"),
            RuntimeError("Dataset scripts are no longer supported"),
        ],
    )
    def test_loading_fails(self, hub: Hub, failure: Exception) -> None:
        hub.answer = failure
        with pytest.raises(ConfigurationError) as caught:
            read_text("wikitext", "calibration")
        message = str(caught.value)
        assert message.startswith("data.dataset: cannot load 'wikitext'")
        assert str(failure) in message
        assert "builtin, wikitext2, c4, ptb, pile" in message

    def test_several_lines_become_one(self, hub: Hub) -> None:
        hub.answer = ValueError("Config name is missing.\nPick one among:\n  a, b")
        with pytest.raises(ConfigurationError, match=r"is missing\. Pick one among: a, b; accepted") as caught:
            read_text("wikitext", "calibration")
        assert "\n" not in str(caught.value)

    def test_package_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ConfigurationError, match="need the package 'datasets'"):
            read_text("c4", "calibration")


class TestHubThatDoesNotAnswer:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """An empty cache, and a hub that is gone."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        with hub_stand_in(tmp_path / "hub") as hub:
            hub.close()
            yield tmp_path / "datasets"

    @pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "pile", "owner/corpus", "corpus"])
    def test_it_is_said_at_once(self, cache: Path, name: str) -> None:
        started = time.monotonic()
        with pytest.raises(ConfigurationError, match=r"^data\.dataset: .* does not answer .*, and .* cache") as caught:
            read_text(name, "calibration")
        assert time.monotonic() - started < 5
        assert "\n" not in str(caught.value)
        assert not datasets.config.HF_HUB_OFFLINE

    def test_what_is_cached_is_read(self, cache: Path) -> None:
        folder = cache / "owner___corpus" / "default" / "0.0.0" / "0123456789abcdef"
        rows(["one", "two", "three"]).save_to_disk(str(folder))
        (folder / "data-00000-of-00001.arrow").rename(folder / "corpus-train.arrow")
        train = datasets.SplitInfo("train", num_examples=3, dataset_name="corpus")
        info = datasets.DatasetInfo(
            builder_name="corpus",
            dataset_name="corpus",
            config_name="default",
            version="0.0.0",
            features=datasets.Features({"text": datasets.Value("string"), "other": datasets.Value("int64")}),
            splits=datasets.SplitDict({"train": train}),
        )
        info.write_to_directory(str(folder))
        assert read_text("owner/corpus", "calibration").stream() == "one\n\ntwo\n\nthree"


class TestFiles:
    @pytest.mark.parametrize("role", ["calibration", "evaluation"])
    def test_txt(self, tmp_path: Path, role: Role) -> None:
        (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
        assert read_text(str(tmp_path / "a.txt"), role).stream() == "one\n\ntwo é\n"

    def test_jsonl(self, tmp_path: Path) -> None:
        lines = [json.dumps({"text": t, "id": 1}) for t in ("one", "two\u2028three\nfour")]
        (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        text = read_text(str(tmp_path / "a.jsonl"), "calibration")
        assert list(text.documents) == ["one", "two\u2028three\nfour"]
        assert text.stream() == "one\n\ntwo\u2028three\nfour"

    def test_parquet(self, tmp_path: Path) -> None:
        table = pa.table({"id": [1, 2], "text": ["one", "two"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert read_text(str(tmp_path / "a.parquet"), "evaluation").stream() == "one\n\ntwo"

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("home")
        assert read_text("~/a.txt", "calibration").stream() == "home"

    def test_builtin(self) -> None:
        assert read_text("builtin", "calibration").stream() == builtin_text("train")
        assert read_text("builtin", "evaluation").stream() == builtin_text("evaluation")


class TestFileErrors:
    @pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "./gone", "~/gone"])
    def test_missing_is_never_asked_from_the_hub(self, hub: Hub, name: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            read_text(name, "evaluation")
        assert str(caught.value) == f"data.evaluation: there is no file '{name}'"
        assert not hub.calls

    def test_folder(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "user").mkdir()
        with pytest.raises(ConfigurationError, match=r"data\.dataset: 'user' is a folder"):
            read_text("user", "calibration")
        assert not hub.calls

    def test_suffix(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text\nx\n")
        with pytest.raises(ConfigurationError, match=r"'a\.csv' is none of \.txt, \.jsonl"):
            read_text("a.csv", "calibration")
        assert not hub.calls

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
    def test_git_lfs_pointer(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ConfigurationError, match=rf"data\.evaluation: .*{name} is a Git LFS pointer.*git lfs pull"):
            read_text(str(tmp_path / name), "evaluation")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 2, is not JSON"),
            ("[1]", "line 2, is not a JSON object"),
            ('{"body": "x", "id": 3}', "line 2, has no column 'text'.*found: body, id"),
            ('{"text": 3}', "line 2, has 3 in column 'text'"),
        ],
    )
    def test_jsonl(self, tmp_path: Path, line: str, message: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
        with pytest.raises(ConfigurationError, match=message):
            read_text(str(tmp_path / "a.jsonl"), "calibration")

    def test_parquet_column(self, tmp_path: Path) -> None:
        parquet.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigurationError, match=r"no column 'text'.*columns found: body, id"):
            read_text(str(tmp_path / "a.parquet"), "calibration")

    def test_parquet_content(self, tmp_path: Path) -> None:
        parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigurationError, match="has 1 in column 'text', row 0"):
            read_text(str(tmp_path / "a.parquet"), "calibration")

    def test_not_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("no")
        with pytest.raises(ConfigurationError, match=r"data\.dataset: cannot read .*a\.parquet"):
            read_text(str(tmp_path / "a.parquet"), "calibration")
