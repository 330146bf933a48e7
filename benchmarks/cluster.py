"""What calibrating on several processes changes, and how much faster it is.

    python benchmarks/cluster.py quality --reference FOLDER
    python benchmarks/cluster.py equal
    python benchmarks/cluster.py speed

``quality`` calibrates the reference models in order and in 2 and 4 segments, with and without stitching, by the
presets' settings but for ``--epochs``. One process calibrates all segments in turn: the factors are those of several
processes, byte for byte (``tests/distributed/test_processes.py``). ``equal`` compares two data-parallel processes
with one on the embedded model, samples of a step computed together and alone. ``speed`` times a model of equal blocks
in one segment and in two, one thread a process, in alternation. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from random_llama import save_random_llama
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCHEMES = ("w4a16", "w3a16", "w4a4")
MODELS = ("llama-outliers", "llama", "opt-outliers")


def fit(folder: Path, config: str, settings: Mapping[str, Any]) -> float:
    """Run a calibration and return its seconds; 0 if it has been run before."""
    if (folder / "model").is_dir():
        return 0.0
    flags = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "train.py"), "fit", f"--config={config}", *flags]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--trainer.accelerator=cpu", "--progress.quiet=true", f"--trainer.default_root_dir={folder}"],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return time.perf_counter() - started


def metrics(folder: Path) -> dict[str, Any]:
    """Return what a run has measured."""
    return dict(json.loads((folder / "metrics.json").read_text()))


def segments(count: int, stitch_epochs: int = 0, stitch_blocks: int | None = 1) -> dict[str, Any]:
    """Settings of so many segments."""
    options = {"segments": count, "stitch_epochs": stitch_epochs, "stitch_blocks": stitch_blocks}
    return {"trainer.strategy": {"class_path": "BlockParallelStrategy", "init_args": options}}


def quality(arguments: argparse.Namespace) -> None:
    """Print perplexities, how far they are from those of a calibration in order, and the time of one process."""
    ways: dict[str, dict[str, Any]] = {"in order": {}}
    for count in (2, 4):
        ways[f"{count} segments"] = segments(count)
    for count in (2, 4):
        ways[f"{count} segments, stitched"] = segments(count, arguments.stitch_epochs, arguments.stitch_blocks)
    print("| model, scheme | full precision | " + " | ".join(ways) + " |")
    print("|---|---|" + "---|" * len(ways))
    for row in arguments.rows:
        model, _, scheme = row.rpartition("-")
        common = {
            "model.path": str(arguments.reference / "models" / model),
            "model.transform": {"lr": 5e-3} if "opt" in model or "a4" in scheme else None,
            "data.dataset": str(arguments.reference / "calibration.npy"),
            "data.samples": 64,
            "data.evaluation": [str(arguments.reference / "evaluation.npy")],
            "trainer.max_epochs": arguments.epochs,
        }
        cells, first = [], 0.0
        for name, way in ways.items():
            if "stitched" in name and "a4" not in scheme:
                cells.append("")
                continue
            folder = arguments.runs / row / name.replace(" ", "-").replace(",", "")
            fit(folder, f"{scheme}.yaml", common | way)
            found = metrics(folder)
            value = found["perplexity"]["evaluation"]["quantized"]
            first = first or value
            share = "" if value == first else f" ({100 * (value / first - 1):+.2f} %)"
            cells.append(f"{value:.3f}{share}, {found['seconds']['calibration']:.0f} s")
        full = found["perplexity"]["evaluation"]["full_precision"]
        print(f"| {row} | {full:.3f} | " + " | ".join(cells) + " |", flush=True)


def make_model(folder: Path, blocks: int, hidden: int) -> None:
    """Write a random model of equal blocks."""
    save_random_llama(
        folder,
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
    )


def random_data(arguments: argparse.Namespace, samples: int, tokens: int, windows: int) -> dict[str, Any]:
    """Write random tokens and return the settings that read them."""
    arguments.runs.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("calibration", samples), ("evaluation", windows)):
        np.save(arguments.runs / f"{name}.npy", generator.integers(0, 512, (count, tokens)))
    return {
        "data.dataset": str(arguments.runs / "calibration.npy"),
        "data.samples": samples,
        "data.evaluation": [str(arguments.runs / "evaluation.npy")],
    }


def equal(arguments: argparse.Namespace) -> None:
    """Print the largest relative difference of the factors of each block, and the metrics of both."""
    common: dict[str, Any] = {"data.batch_size": 4, "data.samples": 32, "trainer.max_epochs": arguments.epochs}
    columns = ("difference of the factors, by block", "codes that differ", "perplexity, 1 process", "2", "s, 1", "2")
    print("| scheme | at once | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for scheme, micro_batch_size in itertools.product(SCHEMES, (None, 1)):
        common["data.micro_batch_size"] = micro_batch_size
        folders = [arguments.runs / f"equal-{scheme}-{micro_batch_size}-{count}" for count in (1, 2)]
        fit(folders[0], f"{scheme}.yaml", common)
        fit(folders[1], f"{scheme}.yaml", common | {"trainer.strategy": "ddp", "trainer.devices": 2})
        found = [metrics(folder) for folder in folders]
        cells = [scheme, micro_batch_size or "all", differences(*folders), moved(*folders)]
        cells += [f"{each['perplexity']['builtin']['quantized']:.7f}" for each in found]
        cells += [f"{each['seconds']['calibration']:.0f}" for each in found]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def differences(*folders: Path) -> str:
    """Return the largest of each block: over its factors, the norm of the difference over the norm."""
    found = []
    for path in sorted((folders[0] / "blocks").iterdir()):
        one, two = load_file(path), load_file(folders[1] / "blocks" / path.name)
        norms = [(factor.double() - two[name].double()).norm() / factor.double().norm() for name, factor in one.items()]
        found.append(f"{float(max(norms)):.0e}")
    return " ".join(found)


def moved(*folders: Path) -> str:
    """Return how many weights of each block have another code."""
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    counts: dict[int, int] = {}
    for name, weight in one.items():
        found = re.search(r"\.layers\.(\d+)\..*proj\.weight$", name)
        if found:
            # A step of four bits is 0.06 of the largest value or more, a rounded scale changes it by 0.001.
            differing = (weight - two[name]).abs() > 0.02 * weight.abs().amax(1, keepdim=True)
            block = int(found[1])
            counts[block] = counts.get(block, 0) + int(differing.sum())
    return " ".join(str(counts[block]) for block in sorted(counts))


def speed(arguments: argparse.Namespace) -> None:
    """Print seconds of the calibration with one segment and with two, and the ratio of those next to each other."""
    model = arguments.runs / "speed-model"
    make_model(model, arguments.blocks, arguments.hidden)
    common = {"model.path": str(model), "trainer.max_epochs": arguments.epochs, "export.format": "null"}
    common |= random_data(arguments, 16, 256, 2)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    inputs: list[float] = []
    for number in range(arguments.repeats):
        for count in seconds:
            folder = arguments.runs / f"speed-{count}-{number}"
            fit(folder, "w4a4.yaml", common | segments(count) | {"trainer.devices": count})
            found = metrics(folder)["seconds"]
            seconds[count].append(found["calibration"])
            inputs += [found["inputs"] / found["calibration"]] if count > 1 else []
        one, two = (each[-1] for each in seconds.values())
        print(f"{one:.1f} and {two:.1f} s, {one / two:.2f} times as fast", flush=True)
    gains = [one / two for one, two in zip(*seconds.values(), strict=True)]
    print(f"median {median(gains):.2f}; inputs are {100 * median(inputs):.1f} % of the time of two segments")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "equal", "speed"))
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/cluster"))
    rows = [f"{model}-{scheme}" for model in MODELS for scheme in SCHEMES]
    parser.add_argument("--rows", nargs="+", default=rows)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--stitch-epochs", type=int, default=5)
    parser.add_argument("--stitch-blocks", type=int, default=None)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    {"quality": quality, "equal": equal, "speed": speed}[arguments.part](arguments)


if __name__ == "__main__":
    main()
