"""Which settings a person has written, and where: flags, and lines of configuration files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from omniquant_pl.cli.messages.config_file import read_nodes
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.utils.presets import find_config

__all__ = ["Written", "config_files", "find_written", "written_settings"]


@dataclass(frozen=True)
class Written:
    """A setting, or a section of some."""

    key: str
    """The whole key; of a list, the place in it is left out."""
    value: str | None
    """As it is written; null: a section or a list."""
    origin: str = ""
    """``own.yaml, line 3``, empty for a flag."""

    def __str__(self) -> str:
        return f"{self.origin}: {self.key}" if self.origin else f"--{self.key}"


def config_files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield what is given to ``--config``, in order."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        flag, separator, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if separator:
            yield value
        elif following is not None:
            yield following


def written_settings(arguments: Sequence[str]) -> list[Written]:
    """Return all settings of a command line: those of files first, as flags win over them."""
    found: list[Written] = []
    for path in config_files(arguments):
        try:
            node = read_nodes(find_config(path))
        except ConfigurationError:
            continue
        if node is not None:
            found += _in_node(node, path, "")
    return found + list(_in_flags(arguments))


def find_written(settings: Sequence[Written], key: str, value: str | None = None) -> Written | None:
    """Find the setting that a message is of, which may have only the end of its key.

    Args:
        settings: All that were written.
        key: The key, or its end.
        value: What was given, if the message has it; the last one otherwise.
    """
    found = [each for each in settings if _plain(each.key) == key or _plain(each.key).endswith(f".{key}")]
    same = [each for each in found if each.value == value]
    return next(reversed(same or found), None)


def _plain(key: str) -> str:
    return key.replace(".init_args.", ".").removesuffix("+")


def _in_flags(arguments: Sequence[str]) -> Iterator[Written]:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            flag, separator, value = argument.removeprefix("--").partition("=")
            yield Written(flag, value if separator else following)


def _in_node(node: yaml.Node, path: str, prefix: str) -> Iterator[Written]:
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _in_node(each, path, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        text = str(value.value) if isinstance(value, yaml.ScalarNode) else None
        yield Written(name, text, f"{path}, line {key.start_mark.line + 1}")
        yield from _in_node(value, path, f"{name}.")
