"""A method's process: how it ended, what it took, and that a signal reaches it."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omniquant_pl.compare.process import Finished, run_logged


def run(code: str, folder: Path) -> Finished:
    return run_logged([sys.executable, "-S", "-c", code], folder / "log.txt")


def test_success(tmp_path: Path) -> None:
    found = run("import time; a = bytearray(64_000_000); print('said'); time.sleep(0.2)", tmp_path)
    assert found.failure is None
    assert found.seconds >= 0.2
    parent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 64e6 < found.host_bytes <= max(parent, 10**9)
    assert (tmp_path / "log.txt").read_text() == "said\n"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (
            "import sys; print('first'); sys.exit('error: model.path: there is no folder')",
            "model.path: there is no folder",
        ),
        ("raise SystemExit(3)", "ended with code 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    ],
)
def test_failure(tmp_path: Path, code: str, failure: str) -> None:
    assert run(code, tmp_path).failure == failure


@pytest.fixture
def stop_soon(tmp_path: Path) -> Iterator[None]:
    """Sends this process a signal whose handler raises, when the other one is there."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(number)

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGUSR2)

    main = threading.get_ident()
    previous = signal.signal(signal.SIGUSR2, stop)
    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()
    signal.signal(signal.SIGUSR2, previous)


def test_a_signal_lets_the_other_process_keep_what_it_has(tmp_path: Path, stop_soon: None) -> None:
    code = f"""
import pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
def keep(*_):
    (folder / "kept").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, keep)
(folder / "ready").touch()
time.sleep(60)
"""
    with pytest.raises(TimeoutError):
        run(code, tmp_path)
    assert (tmp_path / "kept").exists()
