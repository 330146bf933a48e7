"""Kills calibrations at random moments, takes each up again, and compares the files with an uninterrupted run's.

    python benchmarks/chaos.py --kills 50

A small random model is calibrated by the command line's own code, in processes that are forked when everything is
imported, so that a kill hits the calibration and not the start of Python. SIGKILL comes at a moment drawn uniformly
over the time of the uninterrupted run; then the same command runs with ``--ckpt_path last``, and every file in
``blocks/`` and ``model/`` has to have the same bytes. ``--chain`` kills each run that many times before it may end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from random_llama import save_random_llama

from omniquant_pl.cli.program import quieten, run

SETTINGS = {
    "clipping": ["--config=w3a16.yaml"],
    "w4a4, streams on disk": ["--config=w4a4.yaml", "--model.activation_budget={device: 0, host: 0}"],
    "learned rounding": ["--config=w2a16g64.yaml", "--model.rounding.method=learned", "--model.weights.group_size=16"],
    "windows": ["--config=w3a16.yaml", "--model.objective.window={blocks: 2, stride: 1}"],
    "best state": ["--config=w3a16.yaml", "--trainer.callbacks=[omniquant_pl.callbacks.KeepBestState]"],
}


def make_inputs(folder: Path) -> None:
    """Write a random LLaMA and tokens."""
    save_random_llama(
        folder / "model",
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 128, (16, 32)))


def arguments(inputs: Path, folder: Path, settings: list[str]) -> list[str]:
    """Return the command line of one calibration."""
    return [
        "fit",
        *settings,
        f"--model.path={inputs / 'model'}",
        f"--data.dataset={inputs / 'tokens.npy'}",
        f"--data.evaluation=['{inputs / 'tokens.npy'}']",
        "--data.samples=16",
        "--data.sequence_length=32",
        "--data.batch_size=2",
        "--trainer.max_epochs=4",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        f"--trainer.default_root_dir={folder}",
        "--checkpoint.every_n_steps=3",
        "--progress.quiet=true",
    ]


def start(command: list[str], log: Path) -> int:
    """Forks a process that calibrates; returns its number."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        run(command)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int, log: Path) -> None:
    """Wait for a process to end well."""
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a calibration failed with status {status}:\n{log.read_text()[-3000:]}")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every final file."""
    files = sorted(path for part in ("blocks", "model") for path in (folder / part).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_at(child: int, seconds: float) -> bool:
    """Kills a process after some time; returns whether it was still running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def trial(command: list[str], folder: Path, seconds: list[float]) -> int:
    """Kills a calibration at these moments and lets it end; returns how many kills hit."""
    log, hits = folder.with_suffix(".log"), 0
    for number, moment in enumerate(seconds):
        hit = kill_at(start(command if number == 0 else [*command, "--ckpt_path=last"], log), moment)
        while not hit and number == 0:  # faster than the uninterrupted run: once more, earlier
            shutil.rmtree(folder)
            moment *= 0.7
            hit = kill_at(start(command, log), moment)
        hits += hit
    finish(start([*command, "--ckpt_path=last"], log), log)
    return hits


def main() -> int:
    """Run the trials and say how many gave the same files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="calibrations that are killed")
    parser.add_argument("--chain", type=int, default=1, help="kills of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    moments = random.Random(options.seed)
    equal = hits = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_inputs(root)
        expected, duration = {}, {}
        for settings in options.settings:
            folder = root / "whole" / settings
            folder.parent.mkdir(exist_ok=True)
            started = time.monotonic()
            log = folder.with_suffix(".log")
            finish(start(arguments(root, folder, SETTINGS[settings]), log), log)
            duration[settings] = time.monotonic() - started
            expected[settings] = digests(folder)
        for number in range(options.kills):
            settings = options.settings[number % len(options.settings)]
            folder = root / f"trial{number}"
            seconds = [moments.uniform(0, duration[settings]) for _ in range(options.chain)]
            hits += trial(arguments(root, folder, SETTINGS[settings]), folder, seconds)
            found, wanted = digests(folder), expected[settings]
            differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            equal += not differing
            verdict = f"DIFFERENT {', '.join(differing)}" if differing else "equal"
            print(f"{number + 1}: {settings}, killed after {seconds[-1]:.2f} s: {verdict}", flush=True)
            shutil.rmtree(folder)
    print(f"{equal} of {options.kills} equal, {hits} kills hit a running calibration")
    return 0 if equal == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
