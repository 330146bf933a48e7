"""Calibration data from memory: every form of other tools gives the same token ids, the rest is refused by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from omniquant_pl.api.calibration import read_calibration
from omniquant_pl.api.model import Limits
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import ConfigurationError

IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
RAGGED = [[1, 2, 3, 4, 5], [6, 7], list(range(20))]
TEXT = "some words of a text "
CHAT = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine, thanks."}]
SHARED = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Fine, thanks."}]


def read(given: Any, tokenizer: Any = None, asks: bool = False, **settings: Any) -> torch.Tensor:
    return read_calibration(given, tokenizer, Limits(64, 300), CalibrationData(**settings), asks)


def columns(**values: Any) -> list[dict[str, Any]]:
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


WINDOWS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: IDS,
    "int32 tensor": IDS.int,
    "array": IDS.numpy,
    "uint16 array": lambda: IDS.numpy().astype(np.uint16),
    "lists": IDS.tolist,
    "tuples": lambda: tuple(map(tuple, IDS.tolist())),
    "lists of numpy integers": lambda: [list(row) for row in IDS.numpy()],
    "tensors": lambda: list(IDS),
    "tensors of one row": lambda: [row[None] for row in IDS],
    "lists of one row": lambda: [[row] for row in IDS.tolist()],
    "generator": lambda: (row for row in IDS),
    "rows": lambda: columns(input_ids=IDS.tolist()),
    "rows with other columns": lambda: columns(text=["a"] * 4, input_ids=IDS.tolist(), labels=[1] * 4),
    "encodings": lambda: [BatchEncoding({"input_ids": row, "attention_mask": [1] * 16}) for row in IDS.tolist()],
    "a batch": lambda: BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "a mapping": lambda: {"input_ids": IDS.tolist()},
    "Dataset": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}),
    "Dataset of tensors": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("torch"),
    "IterableDataset": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}).to_iterable_dataset(),
    "DataLoader of tuples": lambda: DataLoader(TensorDataset(IDS), batch_size=3),
    "DataLoader of mappings": lambda: DataLoader(columns(input_ids=list(IDS)), batch_size=2),
}


@pytest.mark.parametrize("form", WINDOWS)
def test_rows_of_one_length_are_windows(form: str) -> None:
    found = read(WINDOWS[form]())
    assert found.dtype == torch.int64
    assert torch.equal(found, IDS)


STREAMS: dict[str, tuple[Any, list[int]]] = {
    "a tensor": (torch.arange(40), list(range(40))),
    "an array": (np.arange(40), list(range(40))),
    "one list": (list(range(40)), list(range(40))),
    "ragged lists": (RAGGED, [*RAGGED[0], *RAGGED[1], *RAGGED[2]]),
    "ragged arrays": (np.array([np.array(row) for row in RAGGED], dtype=object), [*RAGGED[0], *RAGGED[1], *RAGGED[2]]),
    "an encoding": ({"input_ids": list(range(40))}, list(range(40))),
}


@pytest.mark.parametrize("form", STREAMS)
def test_other_rows_are_joined(form: str) -> None:
    given, expected = STREAMS[form]
    assert read(given, sequence_length=16).tolist() == expected


@pytest.mark.parametrize("given", [torch.arange(40), np.arange(40), list(range(40)), {"input_ids": list(range(40))}])
def test_one_sequence_is_no_window(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^calibration: 40 tokens are too few for windows of 64"):
        read(given)


@pytest.mark.parametrize("length", [15, 8])
def test_rows_of_another_length_than_is_asked_for_are_joined(length: int) -> None:
    assert torch.equal(read(IDS, sequence_length=length), IDS.flatten())


def test_rows_beyond_the_positions_are_joined() -> None:
    assert torch.equal(read(torch.arange(200)[None]), torch.arange(200))


@pytest.mark.parametrize("of", [torch.tensor, list, np.array])
@pytest.mark.parametrize("kind", [int, bool])
def test_padding_is_left_out(of: Callable[[Any], Any], kind: type) -> None:
    mask = [[kind(number)] * 3 + [kind(1)] * 13 for number in (0, 1, 0, 1)]
    expected = torch.cat([IDS[0, 3:], IDS[1], IDS[2, 3:], IDS[3]])
    assert torch.equal(read({"input_ids": IDS, "attention_mask": of(mask)}, sequence_length=16), expected)
    rows = columns(input_ids=IDS.tolist(), attention_mask=[of(row) for row in mask])
    assert torch.equal(read(rows, sequence_length=16), expected)


TEXTS: dict[str, Any] = {
    "texts": [TEXT, "Grüße 😀"],
    "a tuple": (TEXT, "Grüße 😀"),
    "a generator": "made in the test",
    "an array": np.array([TEXT, "Grüße 😀"]),
    "rows": columns(text=[TEXT, "Grüße 😀"]),
    "columns": {"text": [TEXT, "Grüße 😀"]},
    "Dataset": datasets.Dataset.from_dict({"text": [TEXT, "Grüße 😀"], "id": [1, 2]}),
    "DataLoader": DataLoader([TEXT, "Grüße 😀"], batch_size=2),  # type: ignore[arg-type]
    "a surrogate pair": [TEXT, "Grüße \ud83d\ude00"],
}


@pytest.mark.parametrize("form", TEXTS)
def test_texts_are_joined_by_an_empty_line(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    given = (text for text in TEXTS["texts"]) if form == "a generator" else TEXTS[form]
    expected = tokenizer(f"{TEXT}\n\nGrüße 😀")["input_ids"]
    assert read(given, tokenizer, sequence_length=16).tolist() == expected


CONVERSATIONS: dict[str, Any] = {
    "conversations": [CHAT, CHAT],
    "tuples": (tuple(CHAT), tuple(CHAT)),
    "rows": columns(messages=[CHAT, CHAT]),
    "ShareGPT": columns(conversations=[SHARED, SHARED]),
    "columns": {"messages": [CHAT, CHAT]},
    "Dataset": datasets.Dataset.from_dict({"messages": [CHAT, CHAT]}),
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_go_through_the_chat_template(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = "<user>How are you?<assistant>Fine, thanks." * 2
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert read(CONVERSATIONS[form], tokenizer, sequence_length=16).tolist() == expected


class TestWithoutALength:
    def test_as_many_tokens_as_are_asked_for_are_read(self, tokenizer: PreTrainedTokenizerBase) -> None:
        read_rows: list[int] = []

        def endless() -> Iterator[str]:
            for number in count():
                read_rows.append(number)
                yield TEXT

        assert len(read(endless(), tokenizer, samples=4, sequence_length=32)) > 4 * 32
        assert len(read_rows) == 4 * 32 // len(TEXT) + 1

    def test_as_many_windows_as_are_asked_for_are_read(self) -> None:
        given = (torch.full((32,), number) for number in count())
        assert read(given, samples=4, sequence_length=32)[:4, 0].tolist() == [0, 1, 2, 3]


REFUSED: dict[str, tuple[Any, str]] = {
    "None": ([TEXT, None], "row 1 is None; rows are texts, token ids, "),
    "an object": ([TEXT, object()], "row 1 is a object; rows are "),
    "an empty text": ([TEXT, ""], "row 1 is an empty text"),
    "a blank text": ([TEXT, TEXT, " \n"], "row 2 is an empty text"),
    "an empty list": ([[1, 2], []], "row 1 is empty"),
    "an empty tensor": ([torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)], "row 1 is empty"),
    "nothing": ([], "it holds no rows"),
    "an empty generator": (iter(()), "it holds no rows"),
    "a number": (5, "it is a int; rows are "),
    "bytes": (b"text", "it is a bytes; rows are "),
    "numbers of a generator": ((number for number in range(5)), "row 0 is a int"),
    "half a pair": ([TEXT, "word \ud83d"], r"row 1 has half a surrogate pair, U\+D83D, as character 6"),
    "half a pair in a row": (columns(text=[TEXT, "\ude00"]), "row 1, column text has half a surrogate pair"),
    "half a pair in a message": (
        [CHAT, [{"role": "user", "content": "\ud83d"}]],
        "row 1 message 0 has half a surrogate pair",
    ),
    "None among ids": ([[1, 2], [3, None]], "row 1 has None as token id 1; token ids are whole numbers"),
    "a fraction": ([[1, 2.5]], "row 0 has 2.5 as token id 1"),
    "booleans": ([[1, True]], "row 0 has True as token id 1"),
    "floats": (torch.ones(2, 16), "the Tensor holds float32; token ids are whole numbers"),
    "a mask": (torch.ones(2, 16, dtype=torch.bool), "the Tensor holds bool"),
    "three dimensions": (torch.ones(2, 3, 4, dtype=torch.long), r"the Tensor has shape \[2, 3, 4\]"),
    "a negative id": ([[1, 2], [3, -100]], "row 1 has token id -100, outside 0 to 299"),
    "an unknown id": ([[1, 2], [3, 300]], "row 1 has token id 300, outside 0 to 299"),
    "a huge id": ([[1, 10**30]], "row 0 has 10+ as token id 1"),
    "other columns": (columns(prompt=[TEXT]), "row 0 has no column input_ids, .* or text; columns found: prompt"),
    "None in a column": (columns(text=[TEXT, None]), "row 1, column text is None"),
    "another mask": ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, "the dict, column attention_mask has other"),
    "all padding": (
        {"input_ids": IDS[:2], "attention_mask": torch.zeros(2, 16, dtype=torch.long)},
        "row 0 is all padding",
    ),
    "mixed": ([TEXT, [1, 2]], "row 1 holds token ids, and row 0 text; give rows of one kind"),
    "one conversation": (CHAT, "row 0 is a message, not a conversation"),
    "a message without a role": ([[CHAT[0], {"content": "x"}]], "row 0 message 1 is a dict with content; messages are"),
    "a message without content": ([[{"role": "user", "content": None}]], "row 0 message 0 has no content"),
    "too little": ([[1] * 5, [2] * 4], "9 tokens are too few for windows of 64"),
    "a DatasetDict": (
        datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": [TEXT]})),
        "the DatasetDict has no column .*; columns found: train",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_position(case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=f"^calibration: .*{message}") as caught:
        read(given, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "kind"), [([TEXT], "text"), ([CHAT], "conversation")])
def test_what_needs_a_tokenizer_says_so(given: Any, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^calibration: row 0 is a {kind}, which needs a tokenizer"):
        read(given)


def test_conversations_need_a_chat_template(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigurationError, match=r"^calibration: row 0 is a conversation, .* has no chat template"):
        read([CHAT], bare_tokenizer)


def test_what_the_template_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}x"
    with pytest.raises(ConfigurationError, match=r"^calibration: row 1 does not fit .* chat template: no tools"):
        read([CHAT, [{"role": "tool", "content": "x"}]], tokenizer)


def test_fewer_windows_than_are_asked_for() -> None:
    with pytest.raises(ConfigurationError, match=r"^calibration: data.samples is 5, but there are 4 windows of 16"):
        read(IDS, asks=True, samples=5)
