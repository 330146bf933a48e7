"""What keeping checkpoints costs: seconds of one, and its share of the time between two at the default interval.

    python benchmarks/checkpoint_cost.py

One block of 20 million parameters (hidden 1024, intermediate 5120, random) learns with and without learned rounding,
whose offsets and optimizer state are three numbers for every weight; a checkpoint is written after every step, on the
folder's own disk, with a checksum and a flush. The share is the median time of a checkpoint over the default interval.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from memory import VOCABULARY, make_model

from omniquant_pl.callbacks import CheckpointCallback, FoldCallback
from omniquant_pl.cli.program import quieten
from omniquant_pl.data import CalibrationData
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import RoundingSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

Rounding = Literal["nearest", "learned"]


class TimedTrainer(SequentialTrainer):
    """Measures every checkpoint."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []
        self.sizes: list[int] = []

    def save_checkpoint(self, filepath: Any, *arguments: Any, **options: Any) -> None:
        """As Lightning's."""
        started = time.perf_counter()
        super().save_checkpoint(filepath, *arguments, **options)
        self.seconds.append(time.perf_counter() - started)
        self.sizes.append(Path(filepath).stat().st_size)


def measure(model: Path, tokens: Path, folder: Path, rounding: Rounding) -> TimedTrainer:
    """Let one block learn, with a checkpoint after every step but the last of an epoch."""
    trainer = TimedTrainer(
        max_epochs=1,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FoldCallback(), CheckpointCallback(every_n_steps=1)],
    )
    data = CalibrationData(dataset=str(tokens), samples=8, evaluation=[str(tokens)])
    trainer.fit(OmniQuantModel(str(model), WeightSpec(4, 128), rounding=RoundingSpec(rounding)), datamodule=data)
    return trainer


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where files go; a temporary folder by default")
    options = parser.parse_args()
    quieten()
    minutes = inspect.signature(CheckpointCallback).parameters["every_minutes"].default
    print(f"| rounding | checkpoint, MB | median of its seconds | share at {minutes:g} minutes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        make_model(root / "model", 1, 10**9)
        np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, (8, 64)))
        for rounding in get_args(Rounding):
            trainer = measure(root / "model", root / "tokens.npy", root / rounding, rounding)
            seconds = statistics.median(trainer.seconds)
            share = 100 * seconds / (60 * minutes)
            print(f"| {rounding} | {trainer.sizes[-1] / 1e6:.1f} | {seconds:.2f} | {share:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
