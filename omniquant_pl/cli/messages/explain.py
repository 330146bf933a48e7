"""What the parser says of a command line, in one line: the key or the file, and what would be right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace

from omniquant_pl.cli.messages.asked import Asked
from omniquant_pl.cli.messages.foreign import command_for
from omniquant_pl.cli.messages.phrases import either
from omniquant_pl.cli.messages.unknown import unknown_argument, unknown_key
from omniquant_pl.cli.messages.values import wrong_value

__all__ = ["Asked", "explain"]


def explain(message: str, asked: Asked) -> str:
    """Return a parser's message, shorter, with the whole key and what would be right.

    Args:
        message: The parser's.
        asked: The command line that it is about.
    """
    for pattern, words in _FORMS:
        found = re.search(pattern, message, re.DOTALL)
        if found is not None:
            return words(asked, found)
    return wrong_value(message, asked) or " ".join(message.split())


def _no_command(asked: Asked, found: re.Match[str]) -> str:
    given = shlex.join(asked.arguments) or "--config w4a16g128.yaml --model.path MODEL"
    return f"name a command: {either(asked.commands)}; for example: {asked.program} fit {given}"


def _other_command(asked: Asked, found: re.Match[str]) -> str:
    word, rest = found[1], asked.arguments[asked.arguments.index(found[1]) + 1 :]
    if word.endswith((".yaml", ".yml")):
        return _no_command(replace(asked, arguments=["--config", *asked.arguments]), found)
    command = command_for(word, asked.commands)
    if command is None:
        return f"there is no command {word!r}; there are {', '.join(asked.commands)}"
    return f"there is no command {word!r}; did you mean: {shlex.join([asked.program, command, *rest])}"


def _missing_value(asked: Asked, found: re.Match[str]) -> str:
    return f"{found[1].rpartition('/')[2]}: its value is missing; write {found[1].rpartition('/')[2]} VALUE"


def _required(asked: Asked, found: re.Match[str]) -> str:
    name = asked.last_class()
    return f"{name or 'a class'} cannot do without {found[1]}; add it to its init_args"


def _flag_without_value(asked: Asked, found: re.Match[str]) -> str:
    return f"{found[1].rpartition('/')[2]} takes no value, but {found[2]} was given"


_FORMS: list[tuple[str, Callable[[Asked, re.Match[str]], str]]] = [
    (r"^unrecognized arguments: (\S+)", lambda asked, found: unknown_argument(found[1], asked)),
    (r"^expected \"subcommand\"|is not accepted before subcommand", _no_command),
    (r"invalid choice: '(.*?)' \(", _other_command),
    (r"does not accept option '([^']+)'", lambda asked, found: unknown_key(found[1], asked)),
    (r"^Option '([^']+)' is not accepted$", lambda asked, found: unknown_key(found[1], asked)),
    (r"^argument (\S+): expected one argument", _missing_value),
    (r"^argument (\S+): ignored explicit argument (.+)", _flag_without_value),
    (r"^the following arguments are required: (.+)", _required),
]
