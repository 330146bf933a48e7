"""Text from local files: plain text, JSON lines, Parquet."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from omniquant_pl.checkpoint.pointers import check_not_pointer
from omniquant_pl.data.decoding import MARK, read_decoded
from omniquant_pl.data.text import Role, Text, check_not_empty, checked_text, checked_texts, key_of, wrong_column
from omniquant_pl.errors import ConfigurationError

__all__ = ["SUFFIXES", "TOKEN_SUFFIX", "read_file", "resolve"]

TOKEN_SUFFIX = ".npy"
SUFFIXES = (".txt", ".jsonl", ".parquet", TOKEN_SUFFIX)

_COLUMN = "text"


def resolve(name: str, role: Role) -> Path:
    """Return the file behind a path of the configuration.

    Args:
        name: A path; ``~`` is the home folder.
        role: Which key the path stands in.

    Returns:
        The path of an existing file of a known suffix.

    Raises:
        ConfigurationError: If it is missing, not a file, of another suffix, or a Git LFS pointer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigurationError(key_of(role), f"'{name}' is a folder, not a file")
    if not path.exists():
        raise ConfigurationError(key_of(role), f"there is no file '{name}'")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(key_of(role), f"'{name}' is none of {', '.join(SUFFIXES)}")
    check_not_pointer(path, key_of(role))
    return path


def read_file(path: Path, role: Role) -> Text:
    """Read a .txt file, or the column ``text`` of a .jsonl or .parquet file.

    Args:
        path: An existing file.
        role: Which key the path stands in.

    Returns:
        The documents: the whole .txt file, or one a row.

    Raises:
        ConfigurationError: If it cannot be read, has no such column, or holds what is no text; it names the row.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        return Text(readers[path.suffix.lower()](path, role))
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigurationError(key_of(role), f"cannot read '{path}': {error}") from error


def _read_txt(path: Path, role: Role) -> list[str]:
    text = read_decoded(path)
    check_not_empty([text], f"'{path}'", role)
    return [text]


def _read_jsonl(path: Path, role: Role) -> list[str]:
    lines = (line.strip(f"{MARK} \t") for line in read_decoded(path).split("\n"))  # files put together keep their marks
    texts = [_json_text(line, f"'{path}', line {number},", role) for number, line in enumerate(lines, 1) if line]
    check_not_empty(texts, f"'{path}'", role)
    return texts


def _json_text(line: str, where: str, role: Role) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(key_of(role), f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigurationError(key_of(role), f"{where} is not a JSON object: {line:.80}")
    if _COLUMN not in row:
        raise wrong_column(where, _COLUMN, list(row), role)
    return checked_text(row[_COLUMN], where, f"'{_COLUMN}'", role)


def _read_parquet(path: Path, role: Role) -> list[str]:
    parquet = import_module("pyarrow.parquet")  # comes with `datasets`; slow to import
    columns = parquet.read_schema(path).names
    if _COLUMN not in columns:
        raise wrong_column(f"'{path}'", _COLUMN, columns, role)
    column = parquet.read_table(path, columns=[_COLUMN])[_COLUMN]
    try:
        rows = column.to_pylist()
    except UnicodeDecodeError:
        rows = column.cast("binary").to_pylist()  # to name the row
    return checked_texts(rows, f"'{path}'", _COLUMN, role)
