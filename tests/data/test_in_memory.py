"""What Python code gives to calibrate on, against tokenizer, template and numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from omniquant_pl.data.in_memory import write_calibration
from omniquant_pl.errors import ConfigurationError
from tiny_tokenizers import byte_level

IDS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
TURNS = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
SAID = "[user] How?\n[assistant] So.\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = byte_level()
    found.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        tuple(map(tuple, IDS)),
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        torch.tensor(IDS),
        [torch.tensor(row) for row in IDS],
        [torch.tensor([row]) for row in IDS],
        [np.array(row) for row in IDS],
        (row for row in IDS),
        [{"input_ids": row} for row in IDS],
        {"input_ids": IDS},
        {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(3, 4)},
        [{"input_ids": torch.tensor(IDS[:2])}, {"input_ids": torch.tensor(IDS[2:])}],
        [{"input_ids": [0, *row], "attention_mask": [0, 1, 1, 1, 1]} for row in IDS],
        Dataset.from_dict({"input_ids": IDS}),
        Dataset.from_dict({"input_ids": IDS, "text": ["a", "b", "c"]}),
        DataLoader([{"input_ids": torch.tensor(row)} for row in IDS], batch_size=2),
    ],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_of_one_length_are_the_windows(given: Any, tmp_path: Path) -> None:
    settings = write_calibration(given, None, tmp_path, 8)
    assert settings == {"data.dataset": str(tmp_path / "calibration.npy"), "data.samples": 3}
    assert np.load(settings["data.dataset"]).tolist() == IDS


@pytest.mark.parametrize(
    "given",
    [
        [[1, 2], [3, 4, 5]],
        np.arange(1, 6),
        torch.arange(1, 6),
        [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, {"input_ids": [3, 4, 5]}],
        {"input_ids": [[1, 2, 0], [3, 4, 5]], "attention_mask": [[1, 1, 0], [1, 1, 1]]},
        [[1, 2, 3, 4, 5]],
    ],
    ids=str,
)
def test_others_are_a_stream(given: Any, tmp_path: Path) -> None:
    settings = write_calibration(given, None, tmp_path, 4)
    assert np.load(settings["data.dataset"]).tolist() == [1, 2, 3, 4, 5]
    assert "data.samples" not in settings


def test_an_encoding(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = ["some words", "a few words more"]
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    tokenizer.pad_token_id = 0
    for given in (tokenizer(texts), tokenizer(texts, padding=True, return_tensors="pt"), [tokenizer(t) for t in texts]):
        settings = write_calibration(given, None, tmp_path)
        assert np.load(settings["data.dataset"]).tolist() == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["one", "two"], "one\n\ntwo"),
        ([{"text": "one"}, {"text": "two", "id": 5}], "one\n\ntwo"),
        (Dataset.from_dict({"text": ["one", "two"]}), "one\n\ntwo"),
        (DataLoader([{"text": "one"}, {"text": "two"}], batch_size=2), "one\n\ntwo"),
        ([TURNS], SAID),
        ([TURNS, TURNS[:1]], f"{SAID}\n\n[user] How?\n"),
        ([{"messages": TURNS}], SAID),
        (Dataset.from_dict({"conversations": [TURNS]}), SAID),
        (["ein Ä", "\ud83d\ude00"], "ein Ä\n\n😀"),
    ],
    ids=str,
)
def test_text(given: Any, expected: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = write_calibration(given, tokenizer, tmp_path)
    assert settings == {"data.dataset": str(tmp_path / "calibration.txt")}
    assert (tmp_path / "calibration.txt").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("given", [None, "wikitext2", Path("a.txt")])
def test_names(given: Any, tmp_path: Path) -> None:
    assert write_calibration(given, None, tmp_path) == ({} if given is None else {"data.dataset": str(given)})
    assert not list(tmp_path.iterdir())


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: ["a", None], "row 1 is None; give a text"),
    "empty text": (lambda: ["a", " "], "row 1 is empty; leave it out"),
    "empty row": (lambda: [[1], []], "row 1 is empty; give"),
    "number": (lambda: [1, 2], "row 0 is int; give"),
    "no rows": (list, "it has no rows; give"),
    "not rows": (lambda: 5, "it is int; give rows"),
    "floats": (lambda: [[0.5, 1.0]], "row 0 holds float64, where token ids are whole numbers"),
    "bools": (lambda: torch.ones(2, 3, dtype=torch.bool), "it holds bool, where"),
    "three dimensions": (lambda: torch.zeros(1, 2, 3, dtype=torch.long), r"it has shape \[1, 2, 3\]"),
    "other columns": (lambda: [{"question": "a", "answer": "b"}], "row 0 has question, answer; give"),
    "mixed": (lambda: ["a", [1, 2]], "some rows are texts and some are token ids"),
    "padding alone": (lambda: [{"input_ids": [0, 0], "attention_mask": [0, 0]}], r"row 0 has shape \[0\]"),
    "half a pair": (lambda: ["a", "b \ud83d"], r"row 1 has half a surrogate pair, U\+D83D, as character 3"),
    "no turns": (lambda: [{"messages": ["a"]}], "row 0 has under messages no list of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_are_refused_by_position(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make, message = WRONG[case]
    with pytest.raises(ConfigurationError, match=rf"^calibration: {message}"):
        write_calibration(make(), tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_text_and_conversations_need(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^calibration: it is text, which needs the model's tokenizer"):
        write_calibration(["a"], None, tmp_path)
    with pytest.raises(ConfigurationError, match=r"^calibration: row 0 is a conversation, which needs the model's"):
        write_calibration([TURNS], None, tmp_path)
    with pytest.raises(ConfigurationError, match=r"^calibration: row 0 .* has no chat template; give texts"):
        write_calibration([TURNS], byte_level(), tmp_path)
