"""What other processes have finished, read from the folders of their segments."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["RemoteSegments"]

_INTERVAL = 3.0


class RemoteSegments:
    """Reports the blocks that other processes finish, as soon as their files say so.

    Args:
        folder: Where the folders of all segments are.
        report: Called with the number of the segment and what is known of a block; not by the calling thread.
    """

    def __init__(self, folder: Path, report: Callable[[int, dict[str, Any]], None]) -> None:
        self._folder = folder
        self._report = report
        self._seen: set[tuple[str, int]] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._own: set[int] = set()

    def start(self, own: int) -> None:
        """Begin, and leaves out a segment that this process calibrates itself."""
        self._own.add(own)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="omniquant-segments", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, and report what is left."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None
            self._look()

    def _run(self) -> None:
        while not self._stopping.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        for path in sorted(self._folder.rglob("metrics.json")):
            number = int(path.relative_to(self._folder).parts[0])
            for block in () if number in self._own else _blocks(path):
                key = (str(path), block["index"])
                if key not in self._seen:
                    self._seen.add(key)
                    self._report(number, block)


def _blocks(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from json.loads(path.read_text(encoding="utf-8"))["blocks"]
    except (OSError, ValueError, KeyError):  # it is just being joined
        return
