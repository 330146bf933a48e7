"""Calibration data from memory: checked, and made windows of token ids or one stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.api.model import Limits
from omniquant_pl.api.rows import Row, is_number, read_rows, refused
from omniquant_pl.data import CalibrationData, TextSettings
from omniquant_pl.data.files import TOKEN_SUFFIX, resolve
from omniquant_pl.data.sources import is_path
from omniquant_pl.data.text import Role
from omniquant_pl.data.tokens import encode
from omniquant_pl.errors import ConfigurationError

__all__ = ["Calibration", "check_datasets", "read_calibration"]

Calibration: TypeAlias = str | Path | Tensor | np.ndarray[Any, Any] | Mapping[str, Any] | Iterable[Any]
"""What ``quantize`` takes for calibration data."""


def check_datasets(data: CalibrationData, tokenizer: PreTrainedTokenizerBase | None, key: str | None) -> None:
    """Refuse datasets by name that cannot be read, as far as that can be told without reading them.

    Args:
        data: What the settings name.
        tokenizer: What text needs.
        key: What the calibration set's name was given as; ``None`` where the set is in memory.

    Raises:
        ConfigurationError: If a file is missing, or there is no tokenizer for text.
    """
    if key is not None:
        _check_dataset(data.dataset, tokenizer, key, "calibration")
    for name in data.evaluation.values():
        _check_dataset(name, tokenizer, "data.evaluation", "evaluation")


def _check_dataset(name: str, tokenizer: PreTrainedTokenizerBase | None, key: str, role: Role) -> None:
    path = None
    if is_path(name):
        try:
            path = resolve(name, role)
        except ConfigurationError as error:
            raise ConfigurationError(key, str(error).removeprefix(f"{error.key}: ")) from error
    if tokenizer is None and (path is None or path.suffix.lower() != TOKEN_SUFFIX):
        raise ConfigurationError(key, f"'{name}' is text, which needs a tokenizer; give one, or token ids")


def read_calibration(
    given: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    data: CalibrationData,
    asks_for_samples: bool,
) -> Tensor:
    """Read calibration data.

    Args:
        given: Rows of any form that :func:`~omniquant_pl.api.rows.read_rows` takes.
        tokenizer: What text and conversations need.
        limits: The model's.
        data: How many windows are wanted, of which length.
        asks_for_samples: Whether that number was asked for, or is a preset's.

    Returns:
        int64: windows [windows, length] to use as they are, or a stream [tokens] to cut windows from.

    Raises:
        ConfigurationError: If the data cannot be used; it names the row.
    """
    data.bind(TextSettings(tokenizer, limits.positions, limits.vocabulary, seed=0))
    rows = _collect(given, tokenizer, data)
    tokens = None if _is_stream(given) else _windows(rows, data, limits)
    if tokens is None:
        tokens = _stream(rows, tokenizer)
        if len(tokens) <= data.length:
            message = f"{len(tokens)} tokens are too few for windows of {data.length}; give more, or a smaller"
            raise refused(f"{message} data.sequence_length")
    elif asks_for_samples and len(tokens) < data.samples:
        message = f"data.samples is {data.samples}, but there are {len(tokens)} windows of {tokens.shape[1]} tokens"
        raise refused(f"{message}; give more, or a smaller data.samples")
    _check_vocabulary(tokens, rows, limits)
    return tokens


def _collect(given: Calibration, tokenizer: PreTrainedTokenizerBase | None, data: CalibrationData) -> list[Row]:
    """Return all rows; of what has no length, as many as hold the windows that are asked for."""
    is_endless, wanted = not isinstance(given, Sized), data.samples * data.length
    rows: list[Row] = []
    tokens = 0
    for row in _rows(given, tokenizer):
        if rows and row.kind != rows[0].kind:
            raise refused(f"{row.where} holds {row.kind}, and {rows[0].where} {rows[0].kind}; give rows of one kind")
        rows.append(row)
        if is_endless:
            tokens += len(_ids(row, tokenizer))
            if tokens > wanted and len(rows) >= data.samples:
                break
    if not rows:
        raise refused("it holds no rows")
    return rows


def _rows(given: Calibration, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Row]:
    kind = type(given).__name__
    if isinstance(given, Tensor | np.ndarray | Mapping) or _is_stream(given):
        yield from read_rows(given, f"the {kind}", tokenizer)
    elif isinstance(given, bytes | bytearray) or not isinstance(given, Iterable):
        yield from read_rows(given, "it", tokenizer)
    elif kind == "DataFrame":  # which iterates over the names of its columns
        raise refused('it is a DataFrame; give a column of it, such as list(frame["text"])')
    else:
        for index, row in enumerate(given):
            yield from read_rows(row, f"row {index}", tokenizer)


def _is_stream(given: Any) -> bool:
    """Return whether it is one sequence of token ids, not rows of them."""
    if isinstance(given, Mapping):
        given = given.get("input_ids")
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim == 1 and str(given.dtype) != "object"
    return isinstance(given, list | tuple) and bool(given) and is_number(given[0])


def _ids(row: Row, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if isinstance(row.content, Tensor):
        return row.content
    assert tokenizer is not None
    return encode(tokenizer, row.content)


def _windows(rows: list[Row], data: CalibrationData, limits: Limits) -> Tensor | None:
    """Token ids that are windows already, ``None`` where windows are to be cut."""
    lengths = {len(row.content) for row in rows}
    if rows[0].kind != "token ids" or len(lengths) > 1:
        return None
    length = lengths.pop()
    fits = 2 <= length <= limits.positions if data.sequence_length is None else length == data.sequence_length
    return torch.stack([row.content for row in rows if isinstance(row.content, Tensor)]) if fits else None


def _stream(rows: list[Row], tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    texts = [row.content for row in rows if isinstance(row.content, str)]
    if texts:
        assert tokenizer is not None
        return encode(tokenizer, "\n\n".join(texts))
    return torch.cat([row.content for row in rows if isinstance(row.content, Tensor)])


def _check_vocabulary(tokens: Tensor, rows: list[Row], limits: Limits) -> None:
    """Refuse ids that the model has no embedding for, by row where ids were given."""
    places = [(row.where, row.content) for row in rows if isinstance(row.content, Tensor)]
    for where, ids in places or [("the text", tokens)]:
        wrong = ids[(ids < 0) | (ids >= limits.vocabulary)]
        if len(wrong):
            message = f"{where} has token id {int(wrong[0])}, outside 0 to {limits.vocabulary - 1}"
            raise refused(f"{message} of the model's vocabulary; is it another model's tokenizer?")
