"""Rows of calibration data in the forms that other tools take: texts, token ids, conversations, mappings of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.api.conversations import conversation_ids, is_message
from omniquant_pl.data.decoding import whole_text
from omniquant_pl.errors import ConfigurationError

__all__ = ["Row", "is_number", "read_rows", "refused"]

_COLUMNS = ("input_ids", "messages", "conversations", "text")
_ACCEPTED = "texts, token ids, conversations, or mappings with input_ids, messages or text"
_Kind = Literal["text", "token ids", "conversation"]


@dataclass(frozen=True)
class Row:
    """One text, sequence of token ids, or conversation."""

    kind: _Kind
    """What was given."""
    where: str
    """Its place, for errors."""
    content: str | Tensor
    """The text, or token ids, int64 [tokens]."""


def refused(message: str) -> ConfigurationError:
    """Return the error for calibration data that cannot be used."""
    return ConfigurationError("calibration", message)


def is_number(value: object) -> bool:
    """Return whether a value is what token ids are lists of; that they are whole numbers is checked later."""
    return isinstance(value, int | float | np.number) or (isinstance(value, Tensor) and value.ndim == 0)


def read_rows(value: object, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    """Read one row, or the several rows of a batch.

    Args:
        value: The row.
        where: Its place, for errors.
        tokenizer: What text and conversations need.

    Yields:
        The rows in their order.

    Raises:
        ConfigurationError: If it is none of what is accepted, or empty.
    """
    if isinstance(value, str):
        yield Row("text", where, _text(value, where, tokenizer))
    elif isinstance(value, Mapping):
        yield from _of_mapping(value, where, tokenizer)
    elif isinstance(value, Tensor | np.ndarray):
        yield from _of_array(value, where, tokenizer)
    elif isinstance(value, list | tuple):
        yield from _of_list(value, where, tokenizer)
    else:
        found = "None" if value is None else f"a {type(value).__name__}"
        raise refused(f"{where} is {found}; rows are {_ACCEPTED}")


def _text(text: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise refused(f"{where} is a text, which needs a tokenizer; give one, or token ids")
    if not text.strip():
        raise refused(f"{where} is an empty text; leave it out")
    try:
        return whole_text(text)
    except ValueError as error:
        raise refused(f"{where} has {error}") from error


def _of_list(values: Sequence[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    if not len(values):
        raise refused(f"{where} is empty; leave it out")
    if is_number(values[0]):
        yield Row("token ids", where, _ids(values, where))
    elif is_message(values[0]):
        yield Row("conversation", where, conversation_ids(values, where, tokenizer))
    else:
        for index, value in enumerate(values):
            yield from read_rows(value, f"{where}, entry {index}", tokenizer)


def _ids(values: Sequence[Any], where: str) -> Tensor:
    return torch.tensor([_whole_number(each, where, index) for index, each in enumerate(values)], dtype=torch.int64)


def _whole_number(value: Any, where: str, index: int) -> int:
    if isinstance(value, Tensor) and _is_whole(value):
        value = int(value)
    number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool | Tensor) else None
    if number is None or abs(number) >= 2**31:
        raise refused(f"{where} has {value!r:.80} as token id {index}; token ids are whole numbers of the vocabulary")
    return number


def _of_array(
    array: Tensor | np.ndarray[Any, Any], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Row]:
    if isinstance(array, np.ndarray) and array.dtype.kind in "OUT":  # of texts, or of arrays that differ in length
        yield from read_rows(array.tolist(), where, tokenizer)
        return
    found = array.detach().cpu().numpy() if isinstance(array, Tensor) and _is_whole(array) else array
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        kind = str(array.dtype).removeprefix("torch.")
        raise refused(f"{where} holds {kind}; token ids are whole numbers")
    if found.ndim not in (1, 2):
        raise refused(f"{where} has shape {list(found.shape)}; token ids are [tokens] or [rows, tokens]")
    if not found.size:
        raise refused(f"{where} is empty; leave it out")
    rows = [found] if found.ndim == 1 else list(found)
    for index, row in enumerate(rows):
        place = where if found.ndim == 1 else f"{where}, row {index}"
        yield Row("token ids", place, torch.from_numpy(row.astype(np.int64)))


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _of_mapping(row: Mapping[Any, Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    if is_message(row):
        raise refused(f"{where} is a message, not a conversation; give a list of conversations, lists of messages")
    column = next((name for name in _COLUMNS if name in row), None)
    if column is None:
        columns = ", ".join(map(str, row)) or "none"
        raise refused(f"{where} has no column {', '.join(_COLUMNS[:-1])} or {_COLUMNS[-1]}; columns found: {columns}")
    rows = read_rows(row[column], f"{where}, column {column}", tokenizer)
    if column != "input_ids":
        yield from rows
        return
    found, mask = list(rows), row.get("attention_mask")
    if any(each.kind != "token ids" for each in found):
        raise refused(f"{where}, column input_ids holds no token ids")
    masks = [None] * len(found) if mask is None else _masks(mask, f"{where}, column attention_mask", found)
    yield from map(_without_padding, found, masks)


def _masks(mask: Any, where: str, rows: Sequence[Row]) -> list[Tensor]:
    try:
        masks = _flags(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refused(f"{where} holds something else than 0 and 1") from error
    if [len(each) for each in masks] != [len(row.content) for row in rows]:
        raise refused(f"{where} has other lengths than input_ids")
    return masks


def _flags(mask: Any) -> list[Tensor]:
    if isinstance(mask, list | tuple) and mask and not is_number(mask[0]):
        return [each for inner in mask for each in _flags(inner)]
    flags = mask.detach().cpu() if isinstance(mask, Tensor) else torch.tensor(np.asarray(mask))
    return [each != 0 for each in (flags if flags.ndim > 1 else flags[None])]


def _without_padding(row: Row, mask: Tensor | None) -> Row:
    if mask is None or bool(mask.all()):
        return row
    assert isinstance(row.content, Tensor)
    ids = row.content[mask]
    if not len(ids):
        raise refused(f"{row.where} is all padding by its attention_mask; leave it out")
    return Row(row.kind, row.where, ids)
