"""One row of a comparison, and how a row reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["Row", "comparison_table", "markdown_table", "row_of"]


@dataclass(frozen=True)
class Row:
    """What a method made of the model; without a perplexity, the note says why."""

    method: str
    """Its name in ``methods``."""
    title: str
    """What people call it."""
    perplexity: Mapping[str, float | None] = field(default_factory=dict)
    """By evaluation set; ``None`` is not finite."""
    bits_per_weight: float | None = None
    """Codes, scales and zero points of the quantized weights, over their number."""
    size_bytes: int | None = None
    """The whole checkpoint, packed."""
    seconds: float | None = None
    """Spent on quantizing; measuring is not counted."""
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of the process, ``host`` and ``device``."""
    note: str = ""
    """Why there are no numbers, or in what they differ from those of other rows."""
    fingerprint: str = ""
    """Digest of all that decides the numbers; empty where there are none that could be kept."""

    @property
    def is_measured(self) -> bool:
        """Whether there are numbers."""
        return bool(self.perplexity)


def row_of(content: Mapping[str, Any]) -> Row | None:
    """Return the row that a file holds, ``None`` if it is none."""
    names = {entry.name for entry in fields(Row)}
    return Row(**content) if set(content) == names else None


def _heads(sets: Sequence[str]) -> list[str]:
    return ["method", *sets, "bits a weight", "MB", "s", "peak MB", "note"]


def _cells(row: Row, sets: Sequence[str]) -> list[str]:
    perplexities = [_perplexity(row.perplexity, name) for name in sets]
    size = "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.2f}"
    bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    return [row.title, *perplexities, bits, size, seconds, _memory(row.peak_memory_bytes), row.note]


def _perplexity(values: Mapping[str, float | None], name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _memory(peak: Mapping[str, int]) -> str:
    shown = [
        f"{bytes_ / 1e6:.0f}{'' if place == 'host' else f' ({place})'}" for place, bytes_ in peak.items() if bytes_
    ]
    return " + ".join(shown)


def _sets(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.perplexity))


def comparison_table(rows: Sequence[Row]) -> Group:
    """Return a table for the terminal, one method a row, its perplexities by evaluation set; notes stand below it."""
    sets = _sets(rows)
    table = Table("method")
    for head in _heads(sets)[1:-1]:
        table.add_column(head, justify="right", no_wrap=True)
    notes = [row for row in rows if row.note]
    for row in rows:
        title, *figures, _ = _cells(row, sets)
        mark = f" ({notes.index(row) + 1})" if row.note else ""
        table.add_row(Text(title + mark), *figures)
    lines = [Text(f"({number}) {row.note}") for number, row in enumerate(notes, 1)]
    return Group(table, Text("perplexity: lower is better; s: quantizing alone; MB: packed"), *lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the same table in Markdown."""
    sets = _sets(rows)
    lines = [_heads(sets), ["---", *["---:"] * (len(sets) + 4), "---"], *(_cells(row, sets) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"
