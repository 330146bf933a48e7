"""A method in a process of its own: what it needs is its own, and what it breaks as well."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Finished", "run_logged"]


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    seconds: float
    """From its start."""
    host_bytes: int
    """The most memory that it had at a time; Linux counts what its parent had when it started it."""
    failure: str | None
    """The last line that it wrote, or the signal that ended it; ``None`` if it did what it should."""


def run_logged(command: Sequence[str], log: Path) -> Finished:
    """Run a command; what it writes goes to a file.

    A signal that ends this process ends the other one as well, which is waited for: it may have something to keep.

    Args:
        command: The command line.
        log: The file to write or replace.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    failure = None if process.returncode == 0 else _failure(process.returncode, log)
    return Finished(time.monotonic() - started, usage.ru_maxrss * 1024, failure)


def _failure(code: int, log: Path) -> str:
    """Return a process that was killed has not written why."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"ended with code {code}"
