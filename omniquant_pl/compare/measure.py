"""Measures a model in this process: ``python -m omniquant_pl.compare.measure --help``.

As it is stored, or with the linears of bitsandbytes; by the same formula, one block in memory at a time, as a fit does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.compare.bits_and_bytes import KINDS, BitsAndBytesBlocks
from omniquant_pl.evaluate import original_blocks, perplexity
from omniquant_pl.hidden_states import MemoryBudget
from omniquant_pl.spec import BudgetSpec
from omniquant_pl.utils.files import write_json
from omniquant_pl.utils.memory import peak_memory

__all__ = ["AS_IT_IS", "measure"]

AS_IT_IS = "as_it_is"


def measure(kind: str, source: SourceModel, tokens: Path, room: MemoryBudget) -> dict[str, Any]:
    """Return perplexities, sizes, seconds of quantizing and the process's peak memory.

    Args:
        kind: ``as_it_is``, or one of :data:`omniquant_pl.compare.bits_and_bytes.KINDS`.
        source: The model.
        tokens: A safetensors file of token ids ``[windows, length]`` by name of the evaluation set.
        room: Where to compute, and what hidden states may take.
    """
    blocks = None if kind == AS_IT_IS else BitsAndBytesBlocks(source, kind, room.device)
    build = original_blocks(source) if blocks is None else blocks
    perplexities = {name: perplexity(source, build, found, room) for name, found in load_file(tokens).items()}
    sizes = _sizes(source) if blocks is None else _quantized_sizes(source, blocks)
    seconds = None if blocks is None else blocks.seconds
    return {"perplexity": perplexities, **sizes, "seconds": seconds, "peak_memory_bytes": peak_memory(room.device)}


def _stored_bytes(source: SourceModel, name: str) -> int:
    info = source.describe(name)
    return info.elements * info.element_bytes


def _linear_names(source: SourceModel) -> list[str]:
    """Return the names in the checkpoint of the weights that a scheme quantizes."""
    stored = ((layout, source.stored_names(index)) for index, layout in enumerate(source.layouts))
    return [names[f"{linear}.weight"] for layout, names in stored for linear in layout.linears]


def _sizes(source: SourceModel) -> dict[str, Any]:
    names = _linear_names(source)
    bits = 8 * sum(_stored_bytes(source, name) for name in names)
    weights = sum(source.describe(name).elements for name in names)
    size = sum(_stored_bytes(source, name) for name in source.checkpoint.names())
    return {"bits_per_weight": bits / weights, "size_bytes": size}


def _quantized_sizes(source: SourceModel, blocks: BitsAndBytesBlocks) -> dict[str, Any]:
    bits = sum(blocks.stored_bits.values())
    others = set(source.checkpoint.names()) - set(_linear_names(source))
    size = sum(_stored_bytes(source, name) for name in others) + bits // 8
    return {"bits_per_weight": bits / sum(blocks.weights.values()), "size_bytes": size}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=[AS_IT_IS, *KINDS], default=AS_IT_IS)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--tokens", type=Path, required=True, help="evaluation sets, safetensors")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    for place in ("device", "host"):
        help_text = f"gigabytes of hidden states on the {place}; by default 40 %% of what is free"
        parser.add_argument(f"--{place}-gigabytes", type=float, help=help_text)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    source = SourceModel(options.model, options.trust_remote_code)
    budget = BudgetSpec(options.device_gigabytes, options.host_gigabytes)
    room = MemoryBudget(options.device, options.output.parent, budget)
    write_json(options.output, measure(options.kind, source, options.tokens, room))


if __name__ == "__main__":
    _main()
