"""Keys and words on a command line or in a file that no command knows."""

from __future__ import annotations

import difflib
from pathlib import Path

from omniquant_pl.cli.messages.asked import Asked
from omniquant_pl.cli.messages.foreign import HINTS
from omniquant_pl.cli.messages.keys import children, nearest_keys, parameters_of
from omniquant_pl.cli.messages.phrases import did_you_mean, either
from omniquant_pl.cli.messages.written import Written

__all__ = ["unknown_argument", "unknown_key"]


def unknown_argument(word: str, asked: Asked) -> str:
    """Say what a word on the command line was meant for that is no flag of the command.

    Args:
        word: As it stands there, with its value behind an equals sign.
        asked: The command line.
    """
    name, separator, value = word.partition("=")
    if not separator and ":" in name:
        name, separator, value = word.partition(":")
    if word.startswith("-") and separator == ":" and name.strip("-") in asked.known:
        return f"{word}: a value stands behind an equals sign or a space; write {name}={value}"
    if word.startswith("-"):
        return f"{name}: {_no_setting(name.strip('-'), asked, '--')}"
    nearest = nearest_keys(name, asked.known)
    if separator and nearest:
        return f"{word}: a setting begins with two dashes{did_you_mean([f'--{key}={value}' for key in nearest])}"
    if word in asked.commands:
        return f"{word}: one command at a time; run {asked.program} {word} on its own"
    return f"{word}: {_lonely(word, asked)}"


def _lonely(word: str, asked: Asked) -> str:
    """Return what a value without a flag may have been meant for."""
    before = asked.arguments[asked.arguments.index(word) - 1] if word in asked.arguments else ""
    if word.endswith((".yaml", ".yml")):
        return f"no flag stands in front of it; did you mean --config {word}?"
    if Path(word).is_dir() or word.count("/") == 1:
        return f"no flag stands in front of it; did you mean --model.path {word}?"
    if "=" in before or not before.startswith("-"):
        return "no flag stands in front of it; a value with spaces in it is quoted: --KEY 'A VALUE'"
    return "no flag stands in front of it; settings are written --KEY VALUE"


def unknown_key(key: str, asked: Asked) -> str:
    """Say what a key was meant for, with its place in a file if it stands in one.

    Args:
        key: As the parser names it: the whole of it, or its last part.
        asked: The command line.
    """
    found = asked.find(key)
    if found is None:
        return _no_setting(key, asked, "--")
    name = found.key.replace(".init_args.", ".")
    section, _, last = name.rpartition(".")
    of_class = _of_class(section.removesuffix("+"), last, asked)
    if of_class is not None:
        return f"{found.origin or f'--{found.key}'}: {of_class}"
    if not found.origin:
        return f"--{found.key}: {_no_setting(found.key, asked, '--')}"
    return f"{_first_unknown(found, asked).origin}: {_no_setting(found.key, asked, '')}"


def _of_class(section: str, name: str, asked: Asked) -> str | None:
    """Return what a class does not take, ``None`` where the section is no class."""
    given, classes = asked.class_at(section), asked.classes(section)
    if children(asked.known, section) or given is None or not classes:
        return None
    parameters = parameters_of(given, classes)
    nearest = difflib.get_close_matches(name, parameters, 3)
    accepted = f"; it takes {', '.join(parameters)}" if parameters and not nearest else ""
    return f"{given} ({section}) has no setting {name}{did_you_mean(nearest)}{accepted}"


def _first_unknown(found: Written, asked: Asked) -> Written:
    """Return the outermost key that is not known, of those that lead to a setting in a file."""
    file = found.origin.rpartition(", line ")[0]
    for each in asked.written:
        leads = found.key == each.key or found.key.startswith(f"{each.key}.")
        if leads and each.key not in asked.known and each.origin.startswith(f"{file}, line "):
            return each
    return found


def _no_setting(key: str, asked: Asked, dashes: str) -> str:
    """Return what follows the place of an unknown key."""
    said = "there is no such setting" if dashes else f"there is no setting {key}"
    hint = HINTS.get(key.lower().replace("-", "_"))
    nearest = [f"{dashes}{each}" for each in nearest_keys(key, asked.known)]
    if nearest or hint:
        return said + (did_you_mean(nearest) or f"; {hint}")
    parts = key.split(".")
    for count in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:count])
        inner = children(asked.known, outer)
        if inner:
            return f"{said}; {outer} has {either([each.rpartition('.')[2] for each in inner])}"
        if outer in asked.known:
            return f"{said}; {outer} holds a value, and nothing below it"
    return said
