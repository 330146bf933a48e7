"""Values in configuration files that stand where sections belong, and nulls where there is none."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

import yaml

from omniquant_pl.cli.messages.asked import Asked
from omniquant_pl.cli.messages.keys import children
from omniquant_pl.cli.messages.phrases import either
from omniquant_pl.errors import ConfigurationError

__all__ = ["check_nulls", "check_sections"]


def check_sections(asked: Asked) -> None:
    """Refuse a number, null or the like in a file where settings belong, which the parser takes for a section.

    Args:
        asked: The command line.

    Raises:
        ConfigurationError: If there is one; it names the place.
    """
    if asked.parser is None:
        return
    kinds = _kinds(asked.parser)
    for written in asked.written:
        inner = children(asked.known, written.key)
        if written.origin and inner and written.key not in kinds and _is_misread(written.value):
            some = either([each.rpartition(".")[2] for each in inner[:4]])
            message = f"{written.value or 'null'} is not accepted for a section; expected its settings, such as {some}"
            raise ConfigurationError("--config", f"{written.origin}: {written.key}: {message}")


def check_nulls(config: Mapping[str, Any], asked: Asked) -> None:
    """Refuse null for settings that cannot be null, which the parser lets pass.

    Args:
        config: What was parsed.
        asked: The command line.

    Raises:
        ConfigurationError: If there is one; it names the place.
    """
    if asked.parser is None:
        return
    for key, kind in _kinds(asked.parser).items():
        written = asked.find(key)
        if written is None or written.key != key or config.get(key) is not None or _may_be_null(kind):
            continue
        message = f"{key}: null is not accepted; leave the key out for its default"
        raise ConfigurationError("--config", f"{written.origin}: {message}" if written.origin else message)


def _is_misread(value: str | None) -> bool:
    """Return whether it is neither a section nor a text, for which the parser has words."""
    if value is None:
        return False
    try:
        return not isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:  # a text that was in quotes
        return False


def _kinds(parser: ArgumentParser) -> dict[str, Any]:
    """Annotations of settings by their keys."""
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    return {key: kind for key, kind in kinds.items() if kind is not None}


def _may_be_null(kind: Any) -> bool:
    return kind in (Any, None) or NoneType in get_args(kind)
