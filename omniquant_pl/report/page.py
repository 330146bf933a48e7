"""The page: one file that needs neither network nor script, light or dark as the reader's system is."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omniquant_pl.report.figures import channel_panels, clipping_panels, cost_panels, error_panels, loss_panels
from omniquant_pl.report.record import Record
from omniquant_pl.run.folder import VARIANTS, RunFolder
from omniquant_pl.utils.files import write_text
from omniquant_pl.utils.formatting import format_bytes, format_seconds, number, scientific

__all__ = ["render", "write_report"]

_TEMPLATES = Path(__file__).parent

_ABOUT_CLIPPING = (
    "The share of its range that each row or group of a weight keeps, at both ends: the median, half of all (dark), "
    "nine of ten (light)."
)


def write_report(folder: RunFolder, blocks: int | None = None, refresh_seconds: int | None = None) -> None:
    """Write ``report.html`` into a run folder, whole or not at all.

    Args:
        folder: The run, finished or not.
        blocks: How many blocks there will be; ``None`` where nobody is waiting for more.
        refresh_seconds: After how long an open page looks for a newer one; ``None``: never.
    """
    write_text(folder.report, render(Record.read(folder), blocks, refresh_seconds))


def render(record: Record, blocks: int | None = None, refresh_seconds: int | None = None) -> str:
    """Return the page as HTML; arguments as of :func:`write_report`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(number=number, scientific=scientific, size=format_bytes, time=format_seconds)
    tasks = record.metrics.get("zero_shot", {})
    sections = [
        ("Error", "What each block loses.", error_panels(record)),
        ("Learning", "How the loss of each block falls.", loss_panels(record)),
        (
            "Clipping",
            _ABOUT_CLIPPING,
            clipping_panels(record),
        ),
        ("Activations", _about_activations(record), channel_panels(record)),
        ("Cost", "Time and memory.", cost_panels(record)),
    ]
    return environment.get_template("page.html.jinja").render(
        metrics=record.metrics,
        name=_name(record.metrics["model"]),
        folder=record.folder,
        config=record.config,
        blocks=blocks,
        finished=record.is_finished,
        refresh_seconds=None if record.is_finished else refresh_seconds,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        variants=VARIANTS,
        recovered=dict(_recovered(record.metrics.get("perplexity", {}))),
        zero_shot=_zero_shot(tasks),
        zero_shot_variants=list(dict.fromkeys(variant for variants in tasks.values() for variant in variants)),
        sections=[section for section in sections if section[2]],
        command=_command(record),
        content=json.dumps(record.metrics).replace("<", "\\u003c"),
    )


def _recovered(perplexity: Mapping[str, Mapping[str, float | None]]) -> Iterator[tuple[str, float]]:
    """Share of the distance from round-to-nearest to full precision that calibration goes back, by evaluation set."""
    for name, values in perplexity.items():
        full, nearest, quantized = (values.get(variant) or math.nan for variant in VARIANTS)
        if nearest > full and math.isfinite(quantized):
            yield name, (nearest - quantized) / (nearest - full)


def _zero_shot(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each metric of each task: scores and their standard errors by variant."""
    rows = []
    for task, variants in tasks.items():
        metrics = dict.fromkeys(metric for scores in variants.values() for metric in scores)
        for metric in (name for name in metrics if "_stderr" not in name):
            name, comma, of_filter = metric.partition(",")
            error = f"{name}_stderr{comma}{of_filter}"
            scores = {v: (found[metric], found.get(error)) for v, found in variants.items() if metric in found}
            rows.append({"task": task, "metric": metric, "scores": scores})
    return rows


def _about_activations(record: Record) -> str:
    if any(each.after is not None for block in record.statistics for each in block.inputs):
        return "Channels that linears read, before and after the learned transformation, which evens them out."
    return "Channels that linears read. Nothing transforms them: model.transform is null."


def _command(record: Record) -> str:
    """Return what calibrates the same model again, in another folder."""
    config = shlex.quote(str(record.folder / "config.yaml"))
    again = shlex.quote(f"{record.folder}-again")
    return f"python train.py fit --config {config} --trainer.default_root_dir {again}"


def _name(model: str) -> str:
    """Return a hub id or an embedded name as it is, of a local path its last part."""
    return Path(model).name if Path(model).is_absolute() else model
