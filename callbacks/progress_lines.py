"""The lines of a run for people: each fits 80 columns where names and paths do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omniquant_pl.evaluate import VARIANTS
from omniquant_pl.utils.formatting import duration, format_bytes, number, small

__all__ = ["block_line", "divergence", "encodable", "finish_lines", "variant_name"]

_SEPARATOR = " · "
_NAMES = {"full_precision": "full precision", "round_to_nearest": "round to nearest", "quantized": "calibrated"}


def variant_name(variant: str) -> str:
    """Return what people call a variant of the model."""
    return _NAMES[variant]


def encodable(line: str, encoding: str) -> str:
    """Return a line as a terminal that does not know every character can show it."""
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        plain = line.replace("·", "-").replace("→", "->")
        return plain.encode(encoding, "replace").decode(encoding)
    return line


def divergence(losses: list[float]) -> str | None:
    """Return how the divergence of predictions has fallen over the epochs, ``None`` without epochs."""
    return f"divergence {small(losses[0])} → {small(losses[-1])}" if losses else None


def block_line(
    block: Mapping[str, Any], count: int, left: float | None = None, objective: str | None = None, segment: str = ""
) -> str:
    """Return what became of a block.

    Args:
        block: As in ``metrics.json``: a number that is not finite may be null.
        count: Blocks of the model.
        left: Seconds that the run still takes; ``None`` if that is not known.
        objective: What the block has learned from, where that is not its own error.
        segment: What stands in front of the line.
    """
    parts = [
        f"{segment}block {block['index'] + 1}/{count}",
        *([] if objective is None else [objective]),
        f"error {small(block['relative_error'])} (RTN {small(block['relative_error_rtn'])})",
        duration(block["seconds"]),
        *([] if left is None else [f"{duration(left)} left"]),
    ]
    return _SEPARATOR.join(parts)


def finish_lines(
    name: str, scheme: str, metrics: Mapping[str, Any], model: Path | None, config: Path, seconds: float, talks: bool
) -> Iterator[str]:
    """Yield the last lines of a run: what it is, what it takes, what was lost, what comes next.

    Args:
        name: The model's name.
        scheme: The scheme's.
        metrics: Content of ``metrics.json``.
        model: The exported folder; ``None`` if nothing was exported.
        config: The run's ``config.yaml``.
        seconds: How long the run took.
        talks: Whether the model has a tokenizer, so that it can generate text.
    """
    yield _SEPARATOR.join((f"finished: {name} to {scheme}", duration(seconds)))
    size = metrics.get("size_bytes")
    if size:
        packed = f"size: {format_bytes(size['full_precision'])} → {format_bytes(size['quantized'])} packed"
        disk = [] if model is None else [f"{format_bytes(_bytes_of(model))} in {model}"]
        yield _SEPARATOR.join((packed, *disk))
    for dataset, found in metrics.get("perplexity", {}).items():
        names = {"round_to_nearest": "RTN"}
        values = (f"{names.get(v, variant_name(v))} {number(found[v])}" for v in VARIANTS if v in found)
        yield f"perplexity, {dataset}: {_SEPARATOR.join(values)}"
    program = "python train.py" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    command = "generate --prompt Once" if talks else "export --format packed"
    verb, options = command.split(" ", 1)
    yield f"next: {program} {verb} --config {shlex.quote(str(config))} {options}"


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
