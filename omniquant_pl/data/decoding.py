"""Text from bytes and from strings that may be none: encodings by byte-order mark, surrogate pairs."""

from __future__ import annotations

import codecs
from pathlib import Path

__all__ = ["MARK", "read_decoded", "whole_text"]

MARK = "\ufeff"

# In this order: UTF-32's mark begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_decoded(path: Path) -> str:
    """Read a text file in the encoding that its byte-order mark tells, without one in UTF-8.

    Args:
        path: The file.

    Returns:
        The text without the mark, lines ended by a newline.

    Raises:
        ValueError: If it is not in that encoding, or holds NUL, as UTF-16 without a mark does; it names the line.
        OSError: If it cannot be read.
    """
    content = path.read_bytes()
    mark, encoding = next((found for found in _MARKS if content.startswith(found[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(encoding, "replace").count("\n") + 1
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise ValueError(f"line {line} is not {encoding} ({byte}: {error.reason}); save it as UTF-8") from error
    at = text.find("\0")
    if at >= 0:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"line {line} holds NUL, which text does not; if it is UTF-16, save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def whole_text(text: object) -> str:
    """Return a string that can be encoded: of text, of UTF-8 bytes, or of surrogate pairs that belong together.

    Args:
        text: A row of a dataset.

    Raises:
        ValueError: If it is none of them; it says what is wrong, as in "has ... ".
    """
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"bytes that are not UTF-8 (byte {error.start + 1}: {error.reason})") from error
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.80}")
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return _paired(text)


def _paired(text: str) -> str:
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        at = len(error.object[: error.start].decode("utf-16-le", "replace"))
        half = int.from_bytes(error.object[error.start : error.start + 2], "little")
        message = f"half a surrogate pair, U+{half:04X}, as character {at + 1}"
        raise ValueError(message) from error
