"""The keys that a command knows, and those that a misspelt one was meant for."""

from __future__ import annotations

import difflib
import inspect
from argparse import ArgumentParser
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from omniquant_pl.cli.messages.foreign import KEYS

__all__ = ["children", "classes_of", "known_keys", "nearest_classes", "nearest_keys", "parameters_of"]

_LIKE = 0.7
"""How like a part of a key its misspelling is at least."""
_BETTER = 0.02
_FEW = 3


def known_keys(parser: ArgumentParser) -> list[str]:
    """Return all keys of a command's parser, those of sections and of settings that may be null among them."""
    found: dict[str, None] = {}
    for action in parser._actions:
        is_own = action.option_strings and action.dest not in ("help", "print_config")
        if is_own and not action.dest.endswith(".help"):
            found[action.dest] = None
            found.update(dict.fromkeys(_inside(action.dest, getattr(action, "_typehint", None))))
    return list(found)


def _inside(key: str, kind: Any) -> Iterator[str]:
    """Keys of the fields of a type, or of those that it may be."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        for field in fields(kind):
            yield f"{key}.{field.name}"
            yield from _inside(f"{key}.{field.name}", hints[field.name])
    for option in get_args(kind):
        yield from _inside(key, option)


def children(known: Collection[str], section: str) -> list[str]:
    """Return the keys right below a section."""
    return [key for key in known if key.startswith(f"{section}.") and "." not in key[len(section) + 1 :]]


def nearest_keys(given: str, known: Collection[str]) -> list[str]:
    """Return what a key was meant for, the likeliest first; empty if it is like none.

    Args:
        given: The key as it was written, without dashes in front.
        known: All that there are.
    """
    name = given.strip("-").lower().replace("-", "_").rstrip("+")
    foreign = [key for key in KEYS.get(name, ()) if key in known]
    if foreign:
        return foreign
    same = [key for key in known if key.replace(".", "_") == name.replace(".", "_")]
    if same:
        return same
    scores = {key: _likeness(name.split("."), key.split(".")) for key in known}
    best = max(scores.values(), default=0.0)
    found = [key for key in known if scores[key] > max(_LIKE, best - _BETTER)] if best > 0 else []
    return found if len(found) <= _FEW else []


def _likeness(given: list[str], known: list[str]) -> float:
    """From 0 to 1: like is a key whose every part is like the given one, missing parts count a little."""
    if len(given) > len(known):
        return 0.0
    if given[0] == known[0] and len(given) < len(known):  # a part between them is missing: model.bits
        ends = [given[0], *known[len(known) - len(given) + 1 :]]
    else:
        ends = known[len(known) - len(given) :]
    parts = [difflib.SequenceMatcher(None, *pair).ratio() for pair in zip(given, ends, strict=True)]
    missing = 0.05 * (len(known) - len(given))
    return 0.0 if min(parts) < _LIKE else sum(parts) / len(parts) - missing


def classes_of(parser: ArgumentParser, key: str) -> list[type]:
    """Return the classes that a setting accepts by ``class_path``; they that are imported, with all below them."""
    action = next((action for action in parser._actions if action.dest == key), None)
    return [each for base in _bases(getattr(action, "_typehint", None)) for each in _below(base)]


def _bases(kind: Any) -> Iterator[type]:
    if inspect.isclass(kind) and kind.__module__ not in ("builtins", "datetime", "pathlib"):
        yield kind
    for option in get_args(kind):
        yield from _bases(option)


def _below(base: type) -> Iterator[type]:
    below: list[type] = base.__subclasses__()
    for each in below:
        yield each
        yield from _below(each)


def nearest_classes(given: str, classes: Collection[type]) -> list[str]:
    """Return the names of the classes that a misspelt ``class_path`` was meant for."""
    names = {each.__name__: each for each in classes if not each.__name__.startswith("_")}
    found = difflib.get_close_matches(given.rpartition(".")[2], names, _FEW, _LIKE)
    return found or [name for name in names if given.rpartition(".")[2].lower() in name.lower()][:_FEW]


def parameters_of(name: str, classes: Collection[type]) -> list[str]:
    """Return what a class takes as ``init_args``, by its name or import path."""
    short = name.rpartition(".")[2]
    found = next((each for each in classes if each.__name__ == short), None)
    return [] if found is None else [each for each in inspect.signature(found).parameters if each != "kwargs"]
