"""The package's log in a file: what a run says, and its warnings, each line with its time."""

from __future__ import annotations

import logging
from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["LogFile"]

_log = logging.getLogger("omniquant_pl")


class LogFile:
    """Writes to a file what the package logs, for as long as it is open; warnings still reach the terminal.

    Args:
        path: The file; what it holds stays, so that a run that goes on is written behind its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handlers: list[logging.Handler] = []
        self._level = _log.level

    def open(self) -> None:
        """Begin to write.

        Raises:
            ConfigurationError: If the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(self.path, encoding="utf-8")
        except OSError as error:
            message = f"{self.path} cannot be written: {error.strerror}; give the path of a file"
            raise ConfigurationError("progress.log_file", message) from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        # Python writes warnings to the terminal only while nobody else takes them.
        assert logging.lastResort is not None
        self._handlers = [file, logging.lastResort]
        for handler in self._handlers:
            _log.addHandler(handler)
        self._level = _log.level
        _log.setLevel(logging.INFO)

    def write(self, line: str) -> None:
        """Write a line, if it is open."""
        if self._handlers:
            _log.info(line)

    def close(self) -> None:
        """End writing."""
        if self._handlers:
            _log.setLevel(self._level)
        for handler in self._handlers:
            _log.removeHandler(handler)
        for handler in self._handlers[:1]:
            handler.close()
        self._handlers = []
