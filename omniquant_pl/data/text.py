"""What every source of text returns, and the errors they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omniquant_pl.data.decoding import whole_text
from omniquant_pl.errors import ConfigurationError

__all__ = ["Role", "Text", "check_not_empty", "checked_text", "checked_texts", "key_of", "wrong_column"]

Role = Literal["calibration", "evaluation"]

_KEYS: dict[Role, str] = {"calibration": "data.dataset", "evaluation": "data.evaluation"}


@dataclass(frozen=True)
class Text:
    """The documents of a dataset and how windows are cut from them."""

    documents: Sequence[str]
    """Texts in the dataset's order; may be read lazily."""
    within_documents: bool = False
    """A window lies inside one document; otherwise the documents are one stream."""
    identity: str | None = None
    """Another for every other text, and quicker to tell than the text is to read; null where nothing tells it."""

    def stream(self) -> str:
        """Return all documents, joined by an empty line."""
        return "\n\n".join(self.documents)


def key_of(role: Role) -> str:
    """Return the configuration key that names the dataset of a role."""
    return _KEYS[role]


def checked_texts(texts: Sequence[object], where: str, column: str, role: Role) -> list[str]:
    """Return the rows of a column as strings; UTF-8 bytes are decoded.

    Args:
        texts: The rows.
        where: The file or dataset, for the error.
        column: The column's name, for the error.
        role: Which key is at fault.

    Returns:
        The same rows as text.

    Raises:
        ConfigurationError: If a row is no text, or all of them are empty.
    """
    strings = [checked_text(text, where, f"'{column}', row {row},", role) for row, text in enumerate(texts)]
    check_not_empty(strings, where, role)
    return strings


def checked_text(text: object, where: str, column: str, role: Role) -> str:
    """One row as a string.

    Args:
        text: The row.
        where: The file or dataset, for the error.
        column: The column, in quotes, for the error.
        role: Which key is at fault.

    Raises:
        ConfigurationError: If it is no text.
    """
    try:
        return whole_text(text)
    except ValueError as error:
        message = f"{where} has {error} in column {column} where text is needed"
        raise ConfigurationError(key_of(role), message) from error


def check_not_empty(texts: Sequence[str], where: str, role: Role) -> None:
    """Refuse a dataset without a character.

    Args:
        texts: Its documents.
        where: The file or dataset, for the error.
        role: Which key is at fault.

    Raises:
        ConfigurationError: If all of them are empty or blank.
    """
    if not any(text.strip() for text in texts):
        raise ConfigurationError(key_of(role), f"{where} holds no text in {len(texts)} rows; give one that does")


def wrong_column(where: str, column: str, found: Sequence[str], role: Role) -> ConfigurationError:
    """Return the error for a dataset whose text is not in the expected column."""
    columns = ", ".join(found) or "none"
    message = f"{where} has no column '{column}' to read text from; columns found: {columns}"
    return ConfigurationError(key_of(role), message)
