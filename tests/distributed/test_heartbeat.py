"""A dead process, or one that has failed, is noticed by the others, and they say why."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from processes import together

from omniquant_pl.distributed import HeartbeatMonitor, heartbeat


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "_SILENCE", 1.0)


def heard(rank: int, victim: int, how: str) -> list[str]:
    """What a process hears while another ends in some way."""
    dist.init_process_group("gloo")
    reasons: list[str] = []
    with HeartbeatMonitor(rank, 3, reasons.append).watching():
        time.sleep(0.3)
        if rank == victim and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == victim:
            raise ValueError("no more room")
        ends = time.monotonic() + 10
        while not reasons and time.monotonic() < ends:
            time.sleep(0.05)
        time.sleep(0.5)  # the process that the others meet at stays until they have heard
    return reasons


def test_a_killed_process_is_missed() -> None:
    first, killed, other = together(lambda rank: heard(rank, 1, "killed"), 3)
    assert killed is None
    assert first == other == ["process 1 has given no sign of life for 1 seconds"]


def test_the_first_process_is_missed() -> None:
    killed, *others = together(lambda rank: heard(rank, 0, "killed"), 3)
    assert killed is None
    assert all("is gone" in reason for reasons in others for reason in reasons)
    assert all(others)


def test_a_failure_is_told() -> None:
    first, failed, other = together(lambda rank: heard(rank, 1, "failed"), 3)
    assert "no more room" in str(failed)
    assert len(first) == len(other) == 1
    assert first[0].startswith("process 1 on ")
    assert first[0].endswith(": no more room")
    assert first == other


def quiet(rank: int) -> list[str]:
    dist.init_process_group("gloo")
    reasons: list[str] = []
    with HeartbeatMonitor(rank, 2, reasons.append).watching():
        time.sleep(1.5)
        dist.barrier()
    return reasons


def test_whoever_lives_is_left_alone() -> None:
    assert together(quiet, 2) == [[], []]
