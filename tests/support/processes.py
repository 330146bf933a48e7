"""Processes that find each other through the variables that a launcher sets, with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

_SECONDS = 100.0


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm(rank: int, size: int, port: int) -> dict[str, str]:
    """What srun sets where every process is on a node of its own."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "test",
        "SLURM_NTASKS": str(size),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


Launcher = Callable[[int, int, int], dict[str, str]]


def together(function: Callable[[int], Any], size: int, launcher: Launcher = torchrun) -> list[Any]:
    """Runs a function in forked processes, and returns what each returns or the exception that it raises."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    started = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(function, rank, launcher(rank, size, port), sender))
        process.start()
        sender.close()
        started.append((process, receiver))
    results = []
    try:
        for process, receiver in started:
            assert receiver.poll(_SECONDS), "a process does not end"
            results.append(_received(receiver))
            process.join(_SECONDS)
    finally:
        for process, _ in started:
            process.kill()
    return results


def _received(receiver: Connection) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        return None  # it has been killed


def _run(function: Callable[[int], Any], rank: int, environment: dict[str, str], sender: Connection) -> None:
    os.environ.update(environment)
    try:
        result: Any = function(rank)
    except BaseException as error:  # noqa: BLE001 (it is handed on)
        result = RuntimeError(f"{type(error).__name__}: {error}")
    sender.send(result)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)
