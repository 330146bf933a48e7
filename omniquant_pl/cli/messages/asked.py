"""A command line, and what its command knows."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from functools import cached_property

from omniquant_pl.cli.messages.keys import classes_of, known_keys
from omniquant_pl.cli.messages.written import Written, find_written, written_settings

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """A command line.

    Args:
        arguments: What follows the program's name.
        program: That name.
        commands: All commands.
        parser: The parser of the command that is among the arguments, null where there is none.
    """

    arguments: list[str]
    program: str
    commands: list[str]
    parser: ArgumentParser | None = None

    @cached_property
    def known(self) -> list[str]:
        """The keys of the command."""
        return [] if self.parser is None else known_keys(self.parser)

    @cached_property
    def written(self) -> list[Written]:
        """All settings of the command line and of its files."""
        return written_settings(self.arguments)

    def find(self, key: str, value: str | None = None) -> Written | None:
        """Find the setting that a message is of; see :func:`find_written`."""
        return find_written(self.written, key, value)

    def classes(self, key: str) -> list[type]:
        """Return the classes that a setting may name."""
        return [] if self.parser is None else classes_of(self.parser, key)

    def class_at(self, section: str) -> str | None:
        """Return the class that was named last for a setting, ``None`` if there is none."""
        keys = (section, f"{section}+", f"{section}.class_path")
        names = [each.value for each in self.written if each.key in keys and each.value]
        return names[-1] if names else None

    def last_class(self) -> str | None:
        """Return the class that was named last of all."""
        names = [each.value for each in self.written if each.value and self._names_class(each.key)]
        return names[-1] if names else None

    def _names_class(self, key: str) -> bool:
        return key.endswith(".class_path") or bool(self.classes(key.removesuffix("+")))
