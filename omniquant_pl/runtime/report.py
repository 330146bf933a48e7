"""What a generation took: time and memory, for a person."""

from __future__ import annotations

import sys

from rich.table import Table
from transformers import PreTrainedModel

from omniquant_pl.runtime.generation import Generation
from omniquant_pl.utils.formatting import format_bytes
from omniquant_pl.utils.memory import peak_memory

__all__ = ["generation_table", "memory_line", "weight_bytes", "write_terminal"]


def write_terminal(text: str) -> None:
    """Write a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def generation_table(generation: Generation) -> Table:
    """Return a table of speeds, the prompt and what was generated apart."""
    decode = generation.decode_rate
    table = Table("", "tokens", "tokens per second")
    table.add_row("prompt", str(generation.prompt_tokens), f"{generation.prefill_rate:.1f}")
    table.add_row("generated", str(len(generation.tokens)), "" if decode is None else f"{decode:.1f}")
    return table


def memory_line(model: PreTrainedModel) -> str:
    """Return a sentence on the size of a model and on the most memory that the process has used so far."""
    peak = peak_memory(model.device)
    device = f", device {format_bytes(peak['device'])}" if model.device.type == "cuda" else ""
    return f"weights {format_bytes(weight_bytes(model))}; peak memory: host {format_bytes(peak['host'])}{device}"


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all tensors of a model, those that are shared counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
