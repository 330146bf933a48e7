"""Two nodes on one machine: network namespaces with addresses of their own, and one of them killed.

    python benchmarks/nodes.py            # needs root, and ip of iproute2

A small random model is calibrated in two segments by one process, then by two nodes that find each other by torchrun,
by the variables that srun sets, and data-parallel. The factors must be those of one process. Then a node is killed in
the middle of the calibration; the seconds until the job has ended are printed with what it says, and the calibration
goes on. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import differences, make_model, random_data

ROOT = Path(__file__).parent.parent
NODES = ("omniquant0", "omniquant1")
PORT = 29600


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces, joined by a cable."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    for node in NODES:
        ip("netns", "add", node)
        ip("-n", node, "link", "set", "lo", "up")
    try:
        ip("link", "add", "port", "netns", NODES[0], "type", "veth", "peer", "name", "port", "netns", NODES[1])
        for number, node in enumerate(NODES):
            ip("-n", node, "addr", "add", f"10.99.0.{number + 1}/24", "dev", "port")
            ip("-n", node, "link", "set", "port", "up")
        yield
    finally:
        for node in NODES:
            ip("netns", "del", node)


def fit(model: Path, data: dict[str, object], folder: Path, *flags: str) -> list[str]:
    """Return the command line of a calibration; its options are those of every node."""
    return [
        str(ROOT / "train.py"),
        "fit",
        "--config=w4a4.yaml",
        f"--model.path={model}",
        *(f"--{key}={value}" for key, value in data.items()),
        "--data.batch_size=2",
        "--data.micro_batch_size=1",
        "--trainer.max_epochs=10",
        "--trainer.accelerator=cpu",
        "--checkpoint.every_n_steps=20",
        "--export.format=null",
        f"--trainer.default_root_dir={folder}",
        *flags,
    ]


def by_torchrun(number: int, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return what a person starts on a node."""
    flags = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", "--master-addr=10.99.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, f"--master-port={PORT}", *command], {}


def by_slurm(number: int, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return what srun starts on a node."""
    variables = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "omniquant",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_PROCID": str(number),
        "SLURM_NODEID": str(number),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "10.99.0.1",
        "MASTER_PORT": str(PORT),
    }
    return [sys.executable, *command], variables


def start(launch: object, number: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start one node."""
    assert callable(launch)
    arguments, variables = launch(number, command)
    environment = os.environ | variables | {"GLOO_SOCKET_IFNAME": "port"}
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", NODES[number], *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def both(launch: object, command: Sequence[str], runs: Path) -> None:
    """Run both nodes to their end."""
    nodes = [start(launch, number, command, runs / f"node{number}.log") for number in range(2)]
    codes = [node.wait() for node in nodes]
    if any(codes):
        raise SystemExit(f"ended with {codes}; see {runs}/node*.log")


def is_equal(one: Path, other: Path) -> bool:
    """Return whether two runs have left the same factors, byte for byte."""
    names = sorted(path.name for path in (one / "blocks").iterdir())
    return all((one / "blocks" / name).read_bytes() == (other / "blocks" / name).read_bytes() for name in names)


def kill(launch: object, victim: int, command: Sequence[str], folder: Path, runs: Path) -> None:
    """Kills a node when its segment has a block, and says what becomes of the other."""
    nodes = [start(launch, number, command, runs / f"node{number}.log") for number in range(2)]
    while not any((folder / "segments" / f"{victim:05d}").rglob("*.safetensors")):
        time.sleep(0.2)
    found = subprocess.run(["ip", "netns", "pids", NODES[victim]], check=True, capture_output=True, text=True)
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    started = time.perf_counter()
    code = nodes[1 - victim].wait()
    seconds = time.perf_counter() - started
    lines = (runs / f"node{1 - victim}.log").read_text().splitlines()
    reason = next((line for line in lines if line.startswith("error: ")), "no reason")
    print(f"node {victim} killed: the other ended after {seconds:.0f} s with {code}: {reason}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/nodes"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = arguments.runs.resolve()
    arguments.runs = runs
    make_model(runs / "model", 6, 64)
    data = random_data(arguments, 8, 64, 2)
    segments = ("--trainer.strategy=BlockParallelStrategy", "--trainer.strategy.segments=2")
    parallel, shared = (*segments, "--trainer.num_nodes=2"), ("--trainer.strategy=ddp", "--trainer.num_nodes=2")
    for name, flags in (("alone", segments), ("in-order", ())):
        if not (runs / name / "blocks").is_dir():
            subprocess.run([sys.executable, *fit(runs / "model", data, runs / name, *flags)], check=True)
    with network():
        for name, launch in (("torchrun", by_torchrun), ("slurm", by_slurm)):
            if not (runs / name / "blocks").is_dir():
                both(launch, fit(runs / "model", data, runs / name, *parallel), runs)
            print(f"{name}, 2 segments on 2 nodes: same factors {is_equal(runs / 'alone', runs / name)}", flush=True)
            if not (runs / f"{name}-ddp" / "blocks").is_dir():
                both(launch, fit(runs / "model", data, runs / f"{name}-ddp", *shared), runs)
            print(f"{name}, ddp on 2 nodes: {differences(runs / 'in-order', runs / f'{name}-ddp')}", flush=True)
            for victim in (1, 0):
                folder = runs / f"{name}-killed-{victim}"
                kill(launch, victim, fit(runs / "model", data, folder, *parallel), folder, runs)
                both(launch, fit(runs / "model", data, folder, *parallel, "--ckpt_path=last"), runs)
                print(f"{name}, gone on: same factors {is_equal(runs / 'alone', folder)}", flush=True)


if __name__ == "__main__":
    main()
