"""Seconds from the start of ``train.py fit`` on the embedded model to the end of its first step, and those of imports.

    python benchmarks/start.py --threads 1
    python benchmarks/start.py --threads 2

The imports are those of the command line, next to torch, transformers and lightning alone; all of them in turn, each in
a process of its own. A run that does not count comes first: it leaves the files in the cache of the system,
compiled modules, and the tokens of the text.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
LIBRARIES = "import torch, transformers, lightning.pytorch"
FIRST_STEP = """
import os, sys
from lightning.pytorch import Callback
from omniquant_pl import cli
from omniquant_pl.blocks.module import BlockModule

class Leave(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        os._exit(0)

def leave(self):
    self.trainer.callbacks.append(Leave())
    begin(self)

begin, BlockModule.on_fit_start = BlockModule.on_fit_start, leave
cli.quieten()
cli.run(sys.argv[1:])
os._exit(1)
"""


def seconds(threads: int, code: str, *arguments: str) -> float:
    """Of a process that runs Python code."""
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as usual
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {"libraries": [], "command line": [], "first step": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds + 1):
            fit = ("fit", "--config=w4a4.yaml", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}/run")
            codes = ((LIBRARIES,), ("import omniquant_pl.cli.program",), (FIRST_STEP, *fit))
            new = [seconds(arguments.threads, *code) for code in codes]
            for values, value in zip(found.values(), new, strict=True):
                values.extend([value] if number else [])
    libraries, imports, first = (median(values) for values in found.values())
    print(f"torch, transformers, lightning {libraries:.1f} s; omniquant_pl.cli.program {imports:.1f} s, ", end="")
    print(f"{median(i / j for i, j in zip(found['command line'], found['libraries'], strict=True)):.2f} times that")
    print(f"fit to the end of its first step: {first:.1f} s")


if __name__ == "__main__":
    main()
