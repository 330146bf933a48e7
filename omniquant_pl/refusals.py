"""What jsonargparse says of a value that it does not accept, in one line that names the key."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["in_one_line"]

_KEY = re.compile(r'Parser key "([^"]+)"')
_GIVEN = re.compile(r"(?:Given value|Got value): (.+)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*)?$", re.MULTILINE)
_NOT_A_SECTION = re.compile(r"Unable to load config ['\"](.+?)['\"]")
_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
}


def in_one_line(message: str, arguments: Sequence[str]) -> str:
    """Returns the message, shorter and with the whole key where it is of a known form.

    Args:
        message: The parser's.
        arguments: The command line, which has the whole key where the parser names only its end.
    """
    key = _KEY.search(message)
    if key is None:
        return message
    name = _whole_key(key[1], arguments)
    section = _NOT_A_SECTION.search(message)
    if section is not None:
        return f"{name}: {section[1]} is not accepted; expected its settings, or leave it out"
    given, expected = _GIVEN.search(message), _EXPECTED.findall(message)
    if given is None or not expected:
        return message
    words = dict.fromkeys(word for entry in expected for word in _in_words(entry))
    return f"{name}: {given[1]} is not accepted; expected {', '.join(words)}"


def _whole_key(key: str, arguments: Sequence[str]) -> str:
    flags = {argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")}
    found = [flag for flag in flags if flag == key or flag.endswith(f".{key}")]
    return found[0] if len(found) == 1 else key


def _in_words(expected: str) -> list[str]:
    if expected.startswith("typing.Literal["):
        return re.findall(r"'([^']*)'", expected)
    return [_WORDS.get(expected, expected)]
