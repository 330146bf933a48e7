"""Values that a setting does not accept."""

from __future__ import annotations

import re
from collections.abc import Sequence

from omniquant_pl.cli.messages.asked import Asked
from omniquant_pl.cli.messages.foreign import KEYS
from omniquant_pl.cli.messages.keys import children, nearest_classes
from omniquant_pl.cli.messages.phrases import did_you_mean
from omniquant_pl.cli.messages.written import Written
from omniquant_pl.spec import PRECISIONS

__all__ = ["wrong_value"]

_ACCEPTED = {
    "trainer.precision": PRECISIONS,
    "trainer.strategy": ("auto", "ddp", "single_device", "block_parallel"),
}
"""Of what Lightning accepts, that which works block by block."""

_KEY = re.compile(r'Parser key "([^"]+)"')
_GIVEN = (re.compile(r"Given value: (.*)"), re.compile(r"Got value: (.*)"))
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*)?$", re.MULTILINE)
_CLASS = re.compile(r"Expected a dot import path string: (\S+)|Problem with given class_path '([^']+)'")
_SECTION = re.compile(r"Unable to load config ['\"](.*?)['\"]", re.DOTALL)
_NESTED = re.compile(r"NestedArg\(key='([^']+)', val=(.*)\)")
_NOT_FOR_PEOPLE = re.compile(r"path but|dot import path|valid subclass")
_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'list'>": "a list",
    "<class 'dict'>": "keys and values",
    "<class 'NoneType'>": "null",
}


def wrong_value(message: str, asked: Asked) -> str | None:
    """Return what is wrong with a value and what would be right, ``None`` if the message is not of one."""
    key = _KEY.search(message)
    if key is None:
        return None
    section = _SECTION.search(message)
    given = section or _given(message)
    if given is None:
        return None
    nested = _NESTED.fullmatch(given[1])
    if nested is not None:
        return _nothing_below(key[1], nested[1], asked)
    written = asked.find(key[1], given[1])
    name = key[1] if written is None else written.key.removesuffix("+")
    place = f"{written.origin}: {name}" if written is not None and written.origin else name
    return f"{place}: {_refusal(name, given[1], message, asked, written)}"


def _given(message: str) -> re.Match[str] | None:
    """Return what was given; of a list the entry that is not accepted, where the message has it."""
    whole, part = (form.search(message) for form in _GIVEN)
    return part if whole is None or (part is not None and whole[1].startswith("[")) else whole


def _nothing_below(key: str, part: str, asked: Asked) -> str:
    if asked.classes(key):
        given = asked.class_at(key)
        said = "names no class" if given is None else f"is {given}, which is not the name of a class"
        return f"--{key}.{part}: {key} {said}; name one that has settings first: --{key} CLASS"
    return f"--{key}.{part}: {key} holds a value, and nothing below it; write --{key} VALUE"


def _refusal(key: str, value: str, message: str, asked: Asked, written: Written | None) -> str:
    expected = _expected(key, message)
    kind = _CLASS.search(message)
    inner = children(asked.known, key)
    if "a list" in expected and not value.startswith(("{", "[{")) and not asked.classes(key):
        return _no_list(key, value, asked, written)
    if not value:
        return f"its value is missing; expected {', '.join(expected)}"
    if inner:
        return _no_section(key, value, inner, "null" in expected, asked, written)
    if kind is not None and asked.classes(key) and key not in _ACCEPTED:
        name = kind[1] or kind[2]
        likely = did_you_mean(nearest_classes(name, asked.classes(key)))
        return f"there is no class {name}{likely or '; expected the import path of one, such as package.module.Name'}"
    return f"{value} is not accepted; expected {', '.join(expected)}"


def _expected(key: str, message: str) -> list[str]:
    if key in _ACCEPTED:
        return list(_ACCEPTED[key])
    found = [entry for entry in _EXPECTED.findall(message) if not _NOT_FOR_PEOPLE.match(entry)]
    return list(dict.fromkeys(word for entry in found for word in _in_words(entry)))


def _in_words(expected: str) -> list[str]:
    if expected.startswith("typing.Literal["):
        return re.findall(r"'([^']*)'", expected)
    return [_WORDS.get(expected, expected)]


def _no_list(key: str, value: str, asked: Asked, written: Written | None) -> str:
    if written is not None and written.origin:
        return f"{value} is not a list; write [{value}]"
    whole = _joined(value, asked.arguments)
    entries = whole.strip("[]").replace(" ", ",").split(",")
    quoted = ", ".join(entry.strip("'\"") for entry in entries if entry)
    said = (
        f"{value} is not a list; write" if whole == value else "the shell has split the list at its spaces; quote it:"
    )
    return f"{said} --{key} '[{quoted}]'"


def _joined(value: str, arguments: Sequence[str]) -> str:
    """Return the value with the words that follow it, up to the next flag."""
    start = next((index for index, word in enumerate(arguments) if word == value or word.endswith(f"={value}")), None)
    if start is None:
        return value
    rest: list[str] = []
    for word in arguments[start + 1 :]:
        if word.startswith("-"):
            break
        rest.append(word)
    return " ".join([value, *rest])


def _no_section(
    key: str, value: str, inner: Sequence[str], may_be_null: bool, asked: Asked, written: Written | None
) -> str:
    is_flag = written is None or not written.origin
    if not is_flag and ":" in value:
        return f"{value} is a text; a space belongs behind the colon: {value.replace(':', ': ', 1)}"
    likely = [each for each in KEYS.get(key, ()) if each in asked.known]
    if likely and is_flag:
        return f"{value} is not accepted for a whole section{did_you_mean([f'--{likely[0]} {value}'])}"
    dashes = "--" if is_flag else ""
    shown = [f"{dashes}{each}" for each in inner[:4]] + (["…"] if len(inner) > 4 else [])
    null = "null or " if may_be_null else ""
    return f"{value or 'nothing'} is not accepted; expected {null}its settings: {', '.join(shown)}"
