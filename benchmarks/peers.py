"""Perplexity of reference models quantized by other tools, each in an environment of its own.

    python benchmarks/peers.py --reference FOLDER

Every weight-only row of ``results.json`` in the reference folder goes to every tool: the same calibration tokens, bits
and groups, asymmetric. Each tool hands back a plain float32 model, which is measured here, by one formula for all.
Results are kept in ``peers.json`` in the runs folder and not repeated; a tool that cannot do a row says why there, and
is asked again the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.compare.backends import BACKENDS, Backend
from omniquant_pl.evaluate import original_blocks, perplexity
from omniquant_pl.hidden_states import MemoryBudget

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"
INSTALL_LIMIT = 600  # seconds, for the packages of one tool
ROW_LIMIT = 3600  # seconds, for one row by one method


@dataclass(frozen=True)
class Environment:
    """What is installed for a tool."""

    version: str
    packages: tuple[str, ...]


ENVIRONMENTS = {
    "auto-round": Environment("0.16.1", ("auto-round==0.16.1",)),
    "gptqmodel": Environment("7.6.0", ("gptqmodel==7.6.0",)),
    "llmcompressor": Environment("0.14.0", ("llmcompressor==0.14.0", "transformers==5.17.0")),
}
"""By the tool's package, as :data:`omniquant_pl.compare.backends.BACKENDS` names it."""


@dataclass(frozen=True)
class Row:
    """A reference model and how its weights are quantized."""

    name: str
    model: str
    bits: int
    group_size: int | None
    """Input channels that share a scale; ``None``: one scale per output channel."""


def weight_only_rows(reference: Path) -> list[Row]:
    """Return the weight-only rows of the reference folder, in its order, without repetition."""
    content = json.loads((reference / "results.json").read_text())
    rows = {}
    for name in (entry["name"] for entry in content["original"] + content["peers"]):
        match = re.fullmatch(r"(.+)-w(\d+)a16(?:g(\d+))?", name)
        if match is not None:
            model, bits, group = match.groups()
            rows[name] = Row(name, model, int(bits), None if group is None else int(group))
    return list(rows.values())


def install(name: str, folder: Path) -> Path:
    """Make the environment of a tool unless it is there.

    torch goes first and is pinned in every call, so that no tool chooses another build of it.

    Args:
        name: Key of :data:`ENVIRONMENTS`.
        folder: The tool's folder; receives ``venv`` and, when it is complete, the empty file ``installed``.

    Returns:
        The environment's interpreter.

    Raises:
        subprocess.SubprocessError: pip failed or took too long.
    """
    python = folder / "venv" / "bin" / "python"
    if (folder / "installed").is_file():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    pip = [str(python), "-m", "pip", "install", "--constraint", str(constraints)]
    commands = [
        [sys.executable, "-m", "venv", str(folder / "venv")],
        [*pip, TORCH, "numpy", "setuptools", "wheel"],
        [*pip, *ENVIRONMENTS[name].packages],
    ]
    with (folder / "install.log").open("w") as log:
        for command in commands:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, timeout=INSTALL_LIMIT)
    (folder / "installed").touch()
    return python


def quantize(python: Path, peer: Backend, row: Row, reference: Path, folder: Path) -> None:
    """Let a tool quantize a row; its output goes to ``log.txt`` in the folder, the model to ``model``.

    Raises:
        subprocess.SubprocessError: The worker failed or took too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", peer.module, f"--model={reference / 'models' / row.model}", f"--bits={row.bits}"]
    command += [
        f"--calibration={reference / 'calibration.npy'}",
        f"--method={peer.method}",
        f"--output={folder / 'model'}",
    ]
    command += [] if row.group_size is None else [f"--group-size={row.group_size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}  # the programs of this checkout, which the tool's environment has not
    with (folder / "log.txt").open("w") as log:
        subprocess.run(
            command, check=True, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=ROW_LIMIT
        )


def reason(error: subprocess.SubprocessError, log: Path) -> str:
    """Return pip's first error or the last line that a failed process wrote, or that it took too long."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"stopped after {error.timeout:.0f} s"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR: ")), lines[-1] if lines else str(error))


class Results:
    """The entries of ``peers.json``, one a row and method; the file is read and rewritten whole for each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> list[dict[str, Any]]:
        """Return what the file holds."""
        return json.loads(self._path.read_text()) if self._path.is_file() else []

    def done(self, row: str, peer: str, version: str) -> bool:
        """Say whether this version of the tool has a perplexity for the row."""
        key = (row, peer, version)
        return any("perplexity" in entry and self._key(entry) == key for entry in self.entries())

    def add(self, entry: dict[str, Any]) -> None:
        """Put an entry in the place of the one with the same row and tool."""
        entries = [old for old in self.entries() if self._key(old)[:2] != self._key(entry)[:2]] + [entry]
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(entries, indent=1) + "\n")
        part.replace(self._path)

    @staticmethod
    def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
        return entry["name"], entry["peer"], entry["version"]


def measure(name: str, rows: list[Row], reference: Path, runs: Path, results: Results) -> None:
    """Run one tool on the rows that it has no result for."""
    version = ENVIRONMENTS[name].version
    peers = [peer for peer in BACKENDS if peer.package == name]
    missing = [(row, peer) for row in rows for peer in peers if not results.done(row.name, peer.name, version)]
    if not missing:
        return
    try:
        python = install(name, runs / name)
    except subprocess.SubprocessError as error:
        why = "not installed: " + reason(error, runs / name / "install.log")
        for row, peer in missing:
            results.add({"name": row.name, "peer": peer.name, "version": version, "error": why})
        return
    windows = torch.from_numpy(np.load(reference / "evaluation.npy")).long()
    for row, peer in missing:
        folder = runs / name / f"{row.name}-{peer.method}"
        entry: dict[str, Any] = {"name": row.name, "peer": peer.name, "version": version}
        start = time.monotonic()
        try:
            quantize(python, peer, row, reference, folder)
            seconds = time.monotonic() - start  # of the process: loading included, measuring not
            source = SourceModel(folder / "model")
            found = perplexity(source, original_blocks(source), windows, MemoryBudget(torch.device("cpu"), runs))
            entry |= {"perplexity": round(found, 4), "seconds": round(seconds)}
        except subprocess.SubprocessError as error:
            entry["error"] = reason(error, folder / "log.txt")
        results.add(entry)
        print(json.dumps(entry), flush=True)


def main() -> None:
    """Run what is missing and print the results as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder with results.json, models/ and tokens")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality" / "peers")
    parser.add_argument("--peers", nargs="*", default=list(ENVIRONMENTS), choices=list(ENVIRONMENTS), metavar="PEER")
    parser.add_argument("--rows", nargs="*", help="names of rows; all weight-only rows by default")
    options = parser.parse_args()
    reference, runs = options.reference.resolve(), options.runs.resolve()
    rows = [row for row in weight_only_rows(reference) if options.rows is None or row.name in options.rows]
    runs.mkdir(parents=True, exist_ok=True)
    results = Results(runs / "peers.json")
    for name in options.peers:
        measure(name, rows, reference, runs, results)
    print("| model, scheme | tool | perplexity | s |\n|---|---|---|---|")
    for entry in sorted(results.entries(), key=lambda entry: (entry["name"], entry["peer"])):
        shown = f"{entry['perplexity']:.2f} | {entry['seconds']}" if "perplexity" in entry else f"{entry['error']} |"
        print(f"| {entry['name']} | {entry['peer']} {entry['version']} | {shown} |")


if __name__ == "__main__":
    main()
