"""Signals that end a calibration: heard at once, obeyed where nothing gets lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "SignalHandler", "is_requeued", "requeue"]

_ENDING = ("SIGINT", "SIGTERM")
_REQUEUE = "SIGUSR1"


class Interrupted(BaseException):
    """The calibration ends because of a signal; everything is kept. No handler of errors gets it.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class SignalHandler:
    """Notes signals, and raises :class:`Interrupted` when it is asked to, or at once where nothing is under way.

    SIGINT and SIGTERM end the calibration; so does SIGUSR1 in a job of SLURM, which is put into the queue again. A
    second SIGINT does not wait.

    Args:
        agree: Returns the largest of the numbers that processes have which work together: what one obeys all obey.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self._received: int | None = None
        self._deferred = 0
        self._agree = agree

    @property
    def is_requested(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside; does nothing outside the main thread, where Python delivers none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._received = None
        names = [*_ENDING, *([_REQUEUE] if _job_id() is not None else [])]
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        previous = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for :meth:`obey`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def obey(self) -> None:
        """End the calibration if a signal has come, to whichever process of those that work together.

        Raises:
            Interrupted: Then.
        """
        number = self._agree(self._received or 0)
        if number:
            raise Interrupted(number)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Take the failure of a connection for the signal, if one has come: another process has obeyed it already."""
        try:
            yield
        except RuntimeError as error:
            if self._received is None:
                raise
            raise Interrupted(self._received) from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:  # SLURM sends another one when time is up
            self._received = number
        if not self._deferred:
            raise Interrupted(self._received)


def requeue(error: Interrupted, run: Callable[..., object] = subprocess.run, is_first: bool = True) -> bool:
    """Put the job of SLURM into the queue again if that is what the signal has asked for.

    Args:
        error: What ended the calibration.
        run: Runs a command.
        is_first: Whether this process speaks for the job.

    Returns:
        Whether it was asked for.
    """
    job = _job_id()
    if job is None or error.signal_number != getattr(signal, _REQUEUE, None):
        return False
    if is_first:
        run(["scontrol", "requeue", job], check=True)
    return True


def is_requeued() -> bool:
    """Return whether SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _job_id() -> str | None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
