"""Perplexity of calibrated reference models, next to what the original OmniQuant scores on them.

    python benchmarks/reference_rows.py --reference FOLDER

Every LLaMA row of ``results.json`` is calibrated with the settings written there: the same tokens in the same order,
batch 1, the same epochs, learning rates and bits. ``--windows`` calibrates one row on other token windows instead:
random ones, by seed, of the same token stream. Prints a Markdown table; runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
HEADER = """| model, scheme | full precision | round to nearest | original | ours | ours / original | s |
|---|---|---|---|---|---|---|"""


def command(row: dict[str, Any], reference: Path, calibration: Path, seed: int, folder: Path) -> list[str]:
    """Returns the command line that calibrates a row."""
    weight_bits, activation_bits = row["bits"]
    learned = "{lr: 5.0e-3, alpha: 0.5}" if row["let"] else "null"
    settings = {
        "seed_everything": seed,
        "model.path": reference / "models" / row["model"],
        "model.weights": json.dumps({"bits": weight_bits, "group_size": row["group_size"]}),
        "model.activations": "null" if activation_bits == 16 else json.dumps({"bits": activation_bits}),
        "model.clipping": "{lr: 1.0e-2}",
        "model.transform": learned,
        "model.aug_loss": str(row["aug_loss"]).lower(),
        "data.dataset": calibration,
        "data.samples": 64,
        "data.sequence_length": 256,
        "data.evaluation": f"[{reference / 'evaluation.npy'}]",
        "trainer.max_epochs": row["epochs"],
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "export.format": "null",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return [sys.executable, str(ROOT / "train.py"), "fit", *flags]


def measure(row: dict[str, Any], reference: Path, calibration: Path, seed: int, folder: Path) -> str:
    """Calibrates a row unless that has been done, and returns its line of the table."""
    metrics = folder / "metrics.json"
    done = metrics.is_file() and "quantized" in json.loads(metrics.read_text())["perplexity"]["evaluation"]
    if not done:
        subprocess.run(command(row, reference, calibration, seed, folder), check=True, stdout=subprocess.DEVNULL)
    content = json.loads(metrics.read_text())
    found = content["perplexity"]["evaluation"]
    label = row["name"] if calibration.name == "calibration.npy" else f"{row['name']}, windows of seed {seed}"
    return (
        f"| {label} | {found['full_precision']:.2f} | {found['round_to_nearest']:.2f} | {row['perplexity']:.2f} | "
        f"{found['quantized']:.2f} | {found['quantized'] / row['perplexity']:.4f} | "
        f"{content['seconds']['calibration']:.0f} |"
    )


def main() -> None:
    """Runs the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder with results.json, models/ and tokens")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reference")
    parser.add_argument("--rows", nargs="*", help="names of rows; all LLaMA rows by default")
    parser.add_argument("--windows", type=int, nargs="*", default=[], help="seeds of other token windows")
    options = parser.parse_args()
    reference = options.reference.resolve()
    rows = [row for row in json.loads((reference / "results.json").read_text())["original"] if "llama" in row["name"]]
    rows = [row for row in rows if not options.rows or row["name"] in options.rows]
    calibration = reference / "calibration.npy"
    options.runs.mkdir(parents=True, exist_ok=True)
    stream = options.runs / "stream.npy"
    if options.windows:
        np.save(stream, np.load(calibration).reshape(-1))
    print(HEADER)
    for row in rows:
        if not options.windows:
            print(measure(row, reference, calibration, 2, options.runs / row["name"]), flush=True)
        for seed in options.windows:
            print(measure(row, reference, stream, seed, options.runs / f"{row['name']}-{seed}"), flush=True)


if __name__ == "__main__":
    main()
