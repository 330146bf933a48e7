"""Commands on a run that was never calibrated."""

from __future__ import annotations

import shlex
from pathlib import Path

from omniquant_pl.cli.messages.asked import Asked

__all__ = ["fit_first"]

_SECTIONS = ("config", "c", "model", "data", "trainer", "seed_everything")


def fit_first(folder: Path, asked: Asked) -> str:
    """Return which command calibrates the run that a command line is on, and which runs there are instead.

    Args:
        folder: The run folder, which holds no run.
        asked: The command line.
    """
    given = _of_fit(asked.arguments) or ["--config", "w4a16g128.yaml", "--model.path", "MODEL"]
    said = f"there is no run in {folder}; calibrate it first: {shlex.join([asked.program, 'fit', *given])}"
    runs = sorted(path.as_posix() for path in folder.parent.glob("*/config.yaml"))
    return f"{said}; or take a run that is there: {', '.join(f'--config {run}' for run in runs[:3])}" if runs else said


def _of_fit(arguments: list[str]) -> list[str]:
    """Return the arguments that fit has too."""
    result: list[str] = []
    takes_value = False
    for argument in arguments:
        if argument.startswith("-"):
            flag, separator, _ = argument.lstrip("-").partition("=")
            is_of_fit = flag.partition(".")[0] in _SECTIONS
            takes_value = is_of_fit and not separator
            result += [argument] if is_of_fit else []
        elif takes_value:
            result.append(argument)
            takes_value = False
    return result
