"""Calibration data that Python code holds: what other tools take, written where a configuration finds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.data.decoding import whole_text
from omniquant_pl.errors import ConfigurationError

__all__ = ["Calibration", "write_calibration"]

Calibration: TypeAlias = str | Path | Tensor | np.ndarray | Mapping[str, Any] | Iterable[Any] | None
"""What :func:`omniquant_pl.quantize` takes; see there."""

_KEY = "calibration"
_ACCEPTED = (
    "a text, token ids, a conversation of {role, content}, or a mapping with text, input_ids, messages or conversations"
)
_CONVERSATIONS = ("messages", "conversations")


def write_calibration(
    given: Calibration, tokenizer: PreTrainedTokenizerBase | None, folder: Path, longest: int | None = None
) -> dict[str, Any]:
    """Write calibration data into a folder, and return the settings that name it.

    Args:
        given: The data.
        tokenizer: The model's tokenizer, which texts and conversations need.
        folder: Where files go; it is made where one is written.
        longest: Tokens that a window may have; ``None`` for any number. Longer rows become a stream.

    Raises:
        ConfigurationError: If a row cannot be used; it names the row by its position.
    """
    if given is None:
        return {}
    if isinstance(given, str | Path):
        return {"data.dataset": str(given)}
    if isinstance(given, Tensor | np.ndarray):
        windows = [_ids(each, "it") for each in given] if given.ndim == 2 else [_ids(given, "it")]
        return _write_ids(windows, folder, is_stream=given.ndim == 1)
    rows = [row for position, each in enumerate(_rows(given)) for row in _read(each, f"row {position}", tokenizer)]
    if not rows:
        raise ConfigurationError(_KEY, f"it has no rows; give {_ACCEPTED}")
    texts = [row for row in rows if isinstance(row, str)]
    if len(texts) == len(rows):
        return _write_texts(texts, tokenizer, folder)
    if texts:
        raise ConfigurationError(_KEY, "some rows are texts and some are token ids; give one or the other")
    sequences = [row for row in rows if isinstance(row, Tensor)]
    is_long = longest is not None and max(map(len, sequences)) > longest
    return _write_ids(sequences, folder, is_stream=is_long)


def _rows(given: Any) -> Iterable[Any]:
    """The rows of what was given; one mapping, such as an encoding of a whole batch, is a row of its own."""
    if isinstance(given, Mapping):
        return [given]
    if not isinstance(given, Iterable):
        raise ConfigurationError(_KEY, f"it is {type(given).__name__}; give rows, each {_ACCEPTED}")
    return given


def _read(row: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str | Tensor]:
    """Yield the texts and the token ids, int64 ``[tokens]``, of a row."""
    if isinstance(row, str | bytes):
        yield _text(row, where)
    elif isinstance(row, Mapping):
        yield from _read_mapping(row, where, tokenizer)
    elif _is_conversation(row):
        yield _conversation(row, where, tokenizer)
    elif isinstance(row, Tensor | np.ndarray | Sequence) and _is_nonempty(row):
        array = np.asarray(row)
        yield from (_ids(each, where) for each in (array if array.ndim == 2 else array[None]))
    else:
        found = "None" if row is None else "empty" if hasattr(row, "__len__") and not len(row) else type(row).__name__
        raise ConfigurationError(_KEY, f"{where} is {found}; give {_ACCEPTED}")


def _read_mapping(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str | Tensor]:
    key = next((key for key in ("input_ids", *_CONVERSATIONS, "text") if row.get(key) is not None), None)
    if key is None:
        found = ", ".join(map(str, row)) or "nothing"
        raise ConfigurationError(_KEY, f"{where} has {found}; give {_ACCEPTED}")
    if key == "input_ids":
        yield from _read_encoding(row, where)
    elif key == "text":
        values = [row[key]] if isinstance(row[key], str | bytes) else row[key]
        yield from (_text(value, where) for value in values)
    elif _is_conversation(row[key]):
        yield _conversation(row[key], where, tokenizer)
    else:
        raise ConfigurationError(_KEY, f"{where} has under {key} no list of {{role, content}}")


def _read_encoding(row: Mapping[str, Any], where: str) -> Iterator[Tensor]:
    """Yield the sequences of an encoding without their padding, which no token of a text is."""
    ids, mask = row["input_ids"], row.get("attention_mask")
    is_batch = getattr(ids, "ndim", 1) == 2 or (isinstance(ids, Sequence) and bool(len(ids)) and _has_length(ids[0]))
    sequences = ids if is_batch else [ids]
    masks = [None] * len(sequences) if mask is None else mask if is_batch else [mask]
    for sequence, kept in zip(sequences, masks, strict=True):
        found = _ids(sequence, where)
        yield found if kept is None else _ids(found[torch.as_tensor(np.asarray(kept)).bool()], where)


def _has_length(value: Any) -> bool:
    return hasattr(value, "__len__")


def _is_nonempty(row: Any) -> bool:
    return len(row) > 0


def _is_conversation(row: Any) -> bool:
    return isinstance(row, Sequence) and bool(len(row)) and all(isinstance(turn, Mapping) for turn in row)


def _conversation(turns: Sequence[Mapping[str, Any]], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise ConfigurationError(_KEY, f"{where} is a conversation, which needs the model's tokenizer; give it as well")
    if not tokenizer.chat_template:
        raise ConfigurationError(_KEY, f"{where} is a conversation, and the tokenizer has no chat template; give texts")
    try:
        return _text(tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False), where)
    except Exception as error:
        raise ConfigurationError(_KEY, f"{where} does not fit the chat template: {error}") from error


def _text(value: Any, where: str) -> str:
    try:
        text = whole_text(value)
    except ValueError as error:
        raise ConfigurationError(_KEY, f"{where} has {error} where text is needed") from error
    if "\0" in text:
        raise ConfigurationError(_KEY, f"{where} holds NUL, which text does not")
    if not text.strip():
        raise ConfigurationError(_KEY, f"{where} is empty; leave it out")
    return text


def _ids(values: Any, where: str) -> Tensor:
    """Token ids, int64 ``[tokens]``."""
    try:
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:  # sequences of several lengths
        raise ConfigurationError(
            _KEY, f"{where} is neither a sequence of token ids nor several of one length"
        ) from error
    if array.dtype.kind not in "iu":
        raise ConfigurationError(_KEY, f"{where} holds {array.dtype}, where token ids are whole numbers")
    if array.ndim != 1 or not array.size:
        raise ConfigurationError(_KEY, f"{where} has shape {list(array.shape)}, where token ids are [tokens]")
    return torch.from_numpy(array.astype(np.int64))


def _write_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> dict[str, Any]:
    if tokenizer is None:
        raise ConfigurationError(_KEY, "it is text, which needs the model's tokenizer; give it as well, or token ids")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "calibration.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return {"data.dataset": str(path)}


def _write_ids(rows: Sequence[Tensor], folder: Path, is_stream: bool = False) -> dict[str, Any]:
    """Windows where all rows have one length; otherwise one stream, from which windows are cut."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "calibration.npy"
    if is_stream or len({len(row) for row in rows}) > 1:
        np.save(path, torch.cat(list(rows)).numpy())
        return {"data.dataset": str(path)}
    np.save(path, torch.stack(list(rows)).numpy())
    return {"data.dataset": str(path), "data.samples": len(rows)}
