"""What every source of text returns, and the errors they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omniquant_pl.errors import ConfigurationError

__all__ = ["Role", "Text", "checked_texts", "key_of", "wrong_column"]

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
        """All documents, joined by an empty line."""
        return "\n\n".join(self.documents)


def key_of(role: Role) -> str:
    """The configuration key that names the dataset of a role."""
    return _KEYS[role]


def checked_texts(texts: Sequence[object], where: str, column: str, role: Role) -> list[str]:
    """The rows of a column, all of them strings.

    Args:
        texts: The rows.
        where: The file or dataset, for the error.
        column: The column's name, for the error.
        role: Which key is at fault.

    Returns:
        The same rows.

    Raises:
        ConfigurationError: If a row is something else than a string.
    """
    strings = []
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            message = f"{where} has {text!r} in column '{column}', row {row}, where text is needed"
            raise ConfigurationError(key_of(role), message)
        strings.append(text)
    return strings


def wrong_column(where: str, column: str, found: Sequence[str], role: Role) -> ConfigurationError:
    """The error for a dataset whose text is not in the expected column."""
    columns = ", ".join(found) or "none"
    message = f"{where} has no column '{column}' to read text from; columns found: {columns}"
    return ConfigurationError(key_of(role), message)
