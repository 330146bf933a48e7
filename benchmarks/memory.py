"""Peak host memory of calibration and export against the depth of the model.

    python benchmarks/memory.py --blocks 4 16 64

Random LLaMA models of equal blocks, 20 million parameters each, in bfloat16, are calibrated for one step (W4A16g128,
clipping) and exported, each by a process of its own. Its peak is what the system says when it has ended
(``ru_maxrss``), pages of mapped files among it; what is not of files is sampled every 20 ms (``RssAnon``, Linux). The
streams are in files (``model.activation_budget`` of 0). The last line says how much more the deepest model needs than
the shallowest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from omniquant_pl.export.shards import ShardWriter

ROOT = Path(__file__).parent.parent
SAMPLES, TOKENS, VOCABULARY = 4, 64, 512


def make_model(folder: Path, blocks: int, shard_bytes: int) -> None:
    """Write a random model tensor by tensor."""
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        intermediate_size=5120,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    writer = ShardWriter(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, shard_bytes)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) * 0.02
            yield name, (values + 1 if len(shape) == 1 else values).bfloat16()

    writer.add(tensors())
    writer.finish()


def command(model: Path, tokens: Path, folder: Path, budget: float) -> list[str]:
    """Return the command line that calibrates and exports."""
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "fit",
        "--config=w4a16g128.yaml",
        f"--model.path={model}",
        f"--model.activation_budget={{device: 0, host: {budget}}}",
        f"--data.dataset={tokens}",
        f"--data.evaluation=['{tokens}']",
        f"--data.samples={SAMPLES}",
        f"--data.sequence_length={TOKENS}",
        f"--data.batch_size={SAMPLES}",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        f"--trainer.default_root_dir={folder}",
        "--export.dtype=bfloat16",
        "--progress.quiet=true",
    ]


def peaks_of(arguments: list[str]) -> tuple[int, int]:
    """Run a program; returns the most bytes it had in memory, with the files mapped there and without them."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    anonymous, ended = 0, 0
    while not ended:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        anonymous = max(anonymous, 1024 * int(found[1])) if found else anonymous
        time.sleep(0.02)
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
    if code:
        raise RuntimeError(f"{arguments} failed with status {code}")
    return 1024 * usage.ru_maxrss, anonymous


def measure(blocks: int, root: Path, budget: float, shard_bytes: int) -> dict[str, float]:
    """Return sizes in megabytes, and seconds."""
    model, tokens, folder = root / "model", root / "tokens.npy", root / "run"
    make_model(model, blocks, shard_bytes)
    np.save(tokens, np.random.default_rng(0).integers(0, VOCABULARY, (SAMPLES, TOKENS)))
    peak, anonymous = peaks_of(command(model, tokens, folder, budget))
    metrics = json.loads((folder / "metrics.json").read_text())
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {
        "model": size / 1e6,
        "peak": peak / 1e6,
        "anonymous": anonymous / 1e6,
        "seconds": metrics["seconds"]["total"],
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--budget", type=float, default=0.0, help="gigabytes of host memory for the streams")
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000, help="size of the model's files")
    parser.add_argument("--folder", type=Path, help="where models and runs go; a temporary folder by default")
    options = parser.parse_args()
    print("| blocks | model, MB | peak host memory, MB | of it not of files, MB | seconds |\n|---|---|---|---|---|")
    peaks = []
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            found = measure(blocks, Path(name), options.budget, options.shard_bytes)
        peaks.append(found["peak"])
        print(f"| {blocks} | " + " | ".join(f"{value:.0f}" for value in found.values()) + " |", flush=True)
    print(
        f"\n{options.blocks[-1]} blocks need {100 * (peaks[-1] / peaks[0] - 1):+.1f} % of what {options.blocks[0]} need"
    )


if __name__ == "__main__":
    main()
