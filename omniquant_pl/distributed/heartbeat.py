"""Notices that a process of the job is dead, while the others work on blocks of their own and would not."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from omniquant_pl.errors import CalibrationError

__all__ = ["HeartbeatMonitor"]

_log = logging.getLogger(__name__)

_INTERVAL = 2.0
_SILENCE = 25.0
"""Seconds without a sign after which a process counts as dead."""
_CLOSED = "closed by peer"
"""What gloo says of a process that it cannot reach any more; its error has no type of its own."""
_GRACE = 12.0
"""Seconds for a process to keep what it has learned, after it has heard that another is dead."""


class HeartbeatMonitor:
    """A thread in every process gives signs of life; the first process's misses those of others, theirs misses its.

    It uses the store that torch.distributed was started with. When a process is dead or has failed, the others are told
    to end, so that whoever has started the job can start it again.

    Args:
        rank: Position of this process among all.
        size: Number of processes.
        end: Called in the thread when another process is dead; the default sends this one SIGTERM and does not wait
            for long.
    """

    def __init__(self, rank: int, size: int, end: Callable[[str], None] | None = None) -> None:
        self._rank, self._size = rank, size
        self._end = end or _end_this_process
        self._stopping = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store: Any = _connect() if size > 1 else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside; what is raised inside is told to the others.

        Raises:
            CalibrationError: If another process has gone while this one was waiting for it.
        """
        if self._store is None:
            yield
            return
        thread = threading.Thread(target=self._run, name="omniquant-watch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._stopping.set()
            self._tell(f"process {self._rank} on {socket.gethostname()}: {error or type(error).__name__}")
            if isinstance(error, RuntimeError) and _CLOSED in str(error):
                raise CalibrationError(f"another process of the job is gone: {error}") from error
            raise
        finally:
            self._stopping.set()
            thread.join()

    def _tell(self, reason: str) -> None:
        try:
            self._store.compare_set("failed", "", reason)
        except (RuntimeError, OSError):
            _log.debug("the others are gone already")

    def _run(self) -> None:
        count = 0
        while not self._stopping.wait(_INTERVAL):
            count += 1
            try:
                self._store.set(str(self._rank), str(count))
                reason = self._look()
            except (RuntimeError, OSError) as error:
                reason = f"the process that the others meet at is gone ({str(error).splitlines()[0]})"
            if reason is not None and not self._stopping.is_set():
                self._end(reason)
                return

    def _look(self) -> str | None:
        """Return what has happened, ``None`` if everybody is alive."""
        store = self._store
        assert store is not None
        if store.check(["failed"]):
            return str(store.get("failed").decode())
        for rank in range(1, self._size) if self._rank == 0 else (0,):
            reason = self._look_at(rank)
            if reason is not None:
                self._tell(reason)
                return reason
        return None

    def _look_at(self, rank: int) -> str | None:
        sign = self._store.get(str(rank)) if self._store.check([str(rank)]) else b""
        before, since = self._seen.get(rank, (b"", time.monotonic()))
        if sign != before or rank not in self._seen:
            self._seen[rank] = (sign, time.monotonic())
            return None
        if time.monotonic() - since < _SILENCE:
            return None
        return f"process {rank} has given no sign of life for {_SILENCE:.0f} seconds"


def _connect() -> Any:
    """Another connection to the store of the job: one that waits would keep the thread waiting."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    prefix = f"omniquant-watch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def _end_this_process(reason: str) -> None:
    sys.stderr.write(f"error: the job ends: {reason}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)
