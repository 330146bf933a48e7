"""Configuration files: read before they are parsed, so that a mistake in one is told by file, line and column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from omniquant_pl.errors import ConfigurationError

__all__ = ["check_config_file", "read_nodes"]

_Loader: type[yaml.SafeLoader] = yaml.SafeLoader
_NULL = "tag:yaml.org,2002:null"
_KINDS = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a text"}


def check_config_file(path: str) -> None:
    """Refuse a file that holds no settings, whatever these are.

    Args:
        path: What was given to ``--config``.

    Raises:
        ConfigurationError: If it cannot be read, is no YAML, is empty, holds anything but keys and values, or a key
            twice; it names file, line and column.
    """
    node = read_nodes(path)
    if node is None or node.tag == _NULL or node.value == []:
        raise _error(path, "the file is empty; it holds settings, such as model: {path: tiny-llama}")
    if not isinstance(node, yaml.MappingNode):
        message = f"the file holds {_KINDS.get(type(node), 'no mapping')} where keys and values belong"
        raise _error(path, f"{message}, such as model: {{path: tiny-llama}}", node.start_mark)
    _check_no_twins(path, node)
    names = [name for name, _, value in _entries(node) if value.tag != _NULL]
    if not names:
        empty = next((name for name, _, _ in _entries(node)), None)
        message = "the file has no key of its own" if empty is None else f"{empty} is empty"
        raise _error(path, f"{message}; settings stand below their section, indented", node.start_mark)


def read_nodes(path: str) -> yaml.Node | None:
    """Return the content of a configuration file with the lines that it stands in, ``None`` of an empty one.

    Raises:
        ConfigurationError: As :func:`check_config_file`.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error(path, f"the file is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise _error(path, f"the file cannot be read: {error.strerror}") from error
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _error(path, _problem(error), error.problem_mark) from error
    except yaml.YAMLError as error:  # a character that YAML does not know
        raise _error(path, " ".join(str(error).split())) from error


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it is not YAML"
    if "'\\t'" in problem:
        return "a tab stands where YAML accepts spaces only; indent by spaces"
    if "mapping values are not allowed" in problem:
        return "a second colon in this line, or a line that is indented too far; quote a text that has a colon in it"
    if "expected <block end>" in problem:
        return "this line is not indented like those that it belongs to"
    if problem.startswith("expected ',' or"):
        return "a comma is missing, or a bracket or a brace is not closed, before this place"
    if "<stream end>" in problem or "end of stream" in problem:
        return "the file ends here, and a bracket, a brace or a quote is not closed"
    return problem


def _error(path: str, message: str, mark: yaml.Mark | None = None) -> ConfigurationError:
    place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    return ConfigurationError("--config", f"{path}{place}: {message}")


def _check_no_twins(path: str, node: yaml.Node, prefix: str = "") -> None:
    for name, key, value in _entries(node):
        _check_no_twins(path, value, f"{prefix}{name}.")
        first = next(other for other_name, other, _ in _entries(node) if other_name == name)
        if first is not key:
            line = first.start_mark.line + 1
            message = f"{prefix}{name} is here a second time, after line {line}; only one of them can count"
            raise _error(path, message, key.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check_no_twins(path, each, prefix)


def _entries(node: yaml.Node) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                yield str(key.value), key, value
