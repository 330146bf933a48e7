"""The pictures of a run. Each function draws the panels of one section from what the run has left so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from omniquant_pl.report.record import Record
from omniquant_pl.report.statistics import BlockStatistics, InputStatistics
from omniquant_pl.report.style import BASELINE, CALIBRATED, DETAIL, Panel, depth_colour, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["channel_panels", "clipping_panels", "cost_panels", "error_panels", "loss_panels"]


def error_panels(record: Record) -> list[Panel]:
    """Return what blocks lose: relative errors against round-to-nearest, and what learning has made of the loss."""
    blocks = record.metrics.get("blocks", [])
    if not blocks:
        return []
    at = [block["index"] for block in blocks]
    note = "Squared error of each block's output over the output's mean square, in the quantized stream."
    with panel("Error of each block", note, x="block") as (errors, axes):
        _logarithmic(axes)
        _line(axes, at, _column(blocks, "relative_error_rtn"), BASELINE, "round to nearest")
        _line(axes, at, _column(blocks, "relative_error"), CALIBRATED, "calibrated")
        _finish(axes, at)
    note = "Error of round-to-nearest over that of the calibrated block, behind the same blocks: above 1 it is better."
    with panel("Times better than round-to-nearest", note, x="block") as (gains, axes):
        axes.bar(at, _ratios(blocks), color=CALIBRATED, width=0.7)
        axes.axhline(1, color=BASELINE, linewidth=1.2)
        _whole_numbers(axes, at)
    with panel("Loss before and after learning", "Mean squared error of each block.", x="block") as (losses, axes):
        _logarithmic(axes)
        _line(axes, at, _column(blocks, "loss_initial"), DETAIL, "as it starts")
        _line(axes, at, _column(blocks, "loss_final"), CALIBRATED, "folded")
        _finish(axes, at)
    return [errors, gains, losses]


def loss_panels(record: Record) -> list[Panel]:
    """Loss of every epoch: as it is, and against that of the first epoch, which compares blocks."""
    curves = [(each.index, _numbers(each.epoch_losses)) for each in record.statistics if each.epoch_losses]
    if not curves:
        return []
    note = f"One line a block, {_first_to_last([index for index, _ in curves])}."
    with panel("Loss of each epoch", note, x="epoch") as (absolute, axes):
        _logarithmic(axes)
        _curves(axes, curves, lambda losses: losses)
    note = "The same over the loss of the first epoch: how much each block learns, and whether it is done."
    with panel("Share of the first epoch's loss", note, x="epoch") as (relative, axes):
        _curves(axes, curves, lambda losses: [loss / losses[0] if losses[0] else math.nan for loss in losses])
    return [absolute, relative]


def clipping_panels(record: Record) -> list[Panel]:
    """Share of the weights' ranges that is kept, one panel for each kind of linear."""
    kinds = dict.fromkeys(kind for each in record.statistics for kind in each.clipping)
    return [_clipping(kind, [each for each in record.statistics if kind in each.clipping]) for kind in kinds]


def _clipping(kind: str, blocks: Sequence[BlockStatistics]) -> Panel:
    at: list[float] = [each.index for each in blocks]
    lowest, low, middle, high, highest = zip(*(each.clipping[kind] for each in blocks), strict=True)
    with panel(kind, x="block") as (drawn, axes):
        if len(at) == 1:  # a band needs two ends
            at = [at[0] - 0.3, at[0] + 0.3]
            lowest, low, middle, high, highest = (values * 2 for values in (lowest, low, middle, high, highest))
        axes.fill_between(at, lowest, highest, color=CALIBRATED, alpha=0.2, linewidth=0)
        axes.fill_between(at, low, high, color=CALIBRATED, alpha=0.35, linewidth=0)
        axes.plot(at, middle, color=CALIBRATED)
        axes.set_ylim(None, 1.001)
        _whole_numbers(axes, [each.index for each in blocks])
    return drawn


def channel_panels(record: Record) -> list[Panel]:
    """Magnitudes of activation channels before and after the transformation: over the blocks, and one block closely."""
    kinds = dict.fromkeys(tuple(each.readers) for block in record.statistics for each in block.inputs)
    outliers, profiles = [], []
    for readers in kinds:
        blocks = [(block.index, _reads(block, readers)) for block in record.statistics]
        known = [(index, values) for index, values in blocks if values is not None]
        outliers.append(_outliers(readers, known))
        profiles.append(_profile(readers, *max(known, key=lambda each: _outlier(each[1]))))
    return outliers + profiles


def _reads(block: BlockStatistics, readers: tuple[str, ...]) -> InputStatistics | None:
    return next((each for each in block.inputs if tuple(each.readers) == readers), None)


def _outliers(readers: tuple[str, ...], blocks: Sequence[tuple[int, InputStatistics]]) -> Panel:
    at = [index for index, _ in blocks]
    with panel(f"Outliers into {_short(readers)}", "Largest channel over the median one.", x="block") as (drawn, axes):
        _logarithmic(axes)
        _line(axes, at, [_outlier(values) for _, values in blocks], BASELINE, "before")
        if all(values.after is not None for _, values in blocks):
            after = [_over(max(values.after or [0.0]), values.median_after) for _, values in blocks]
            _line(axes, at, after, CALIBRATED, "after")
        _finish(axes, at)
    return drawn


def _profile(readers: tuple[str, ...], index: int, values: InputStatistics) -> Panel:
    note = f"Largest magnitude of each channel over the median one, in block {index}, where outliers are largest."
    with panel(f"Channels into {_short(readers)}, block {index}", note, x="channels, in order") as (drawn, axes):
        places = range(len(values.before))
        before = [_over(value, values.median_before) for value in values.before]
        axes.fill_between(places, 0, before, color=BASELINE, alpha=0.55, linewidth=0, label="before")
        if values.after is not None:
            after = [_over(value, values.median_after) for value in values.after]
            axes.plot(places, after, color=CALIBRATED, linewidth=1.3, label="after")
        axes.set_ylim(0, None)
        axes.set_xticks([])
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper right")
    return drawn


def _outlier(values: InputStatistics) -> float:
    return _over(max(values.before), values.median_before)


def _over(value: float | None, median: float | None) -> float:
    return math.nan if value is None or not median else value / median


def cost_panels(record: Record) -> list[Panel]:
    """Time and memory of the blocks."""
    blocks = record.metrics.get("blocks", [])
    if not blocks:
        return []
    at = [block["index"] for block in blocks]
    with panel("Seconds of each block", "Blocks that learn together count for the first.", x="block") as (time, axes):
        axes.bar(at, _column(blocks, "seconds"), color=CALIBRATED, width=0.7)
        _whole_numbers(axes, at)
    if not record.statistics:
        return [time]
    note = "The most in use up to the end of each block: a level line says that memory does not grow with depth."
    with panel("Peak memory in GB", note, x="block") as (memory, axes):
        at = [each.index for each in record.statistics]
        for place, colour in (("host", DETAIL), ("device", CALIBRATED)):
            peaks = [each.peak_memory_bytes.get(place, 0) / 1e9 for each in record.statistics]
            if any(peaks):
                _line(axes, at, peaks, colour, place)
        axes.set_ylim(0, None)
        _finish(axes, at)
    return [time, memory]


def _line(axes: Axes, at: Sequence[float], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(at, values, color=colour, label=label, marker="o" if len(at) <= 40 else None)


def _logarithmic(axes: Axes) -> None:
    """Make a scale's ticks plain numbers, also where it spans less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, at: Sequence[int]) -> None:
    _whole_numbers(axes, at)
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    axes.legend(loc="upper left", ncols=2, borderaxespad=0.0)


def _whole_numbers(axes: Axes, at: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(at) - 0.6, max(at) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(visible=False, axis="x")


def _curves(axes: Axes, curves: Sequence[tuple[int, list[float]]], shown: Callable[[list[float]], list[float]]) -> None:
    for position, (_, losses) in enumerate(curves):
        colour = depth_colour(position / max(1, len(curves) - 1))
        marker = "o" if len(losses) == 1 else None
        axes.plot(range(1, len(losses) + 1), shown(losses), color=colour, linewidth=1.4, marker=marker)
    _whole_numbers(axes, [1, max(len(losses) for _, losses in curves)])


def _first_to_last(indices: Sequence[int]) -> str:
    return f"from violet, block {indices[0]}, to yellow, block {indices[-1]}" if len(indices) > 1 else "only one so far"


def _ratios(blocks: Sequence[dict[str, Any]]) -> list[float]:
    pairs = zip(_column(blocks, "relative_error_rtn"), _column(blocks, "relative_error"), strict=True)
    return [nearest / calibrated if calibrated else math.nan for nearest, calibrated in pairs]


def _column(blocks: Sequence[dict[str, Any]], key: str) -> list[float]:
    return _numbers(block[key] for block in blocks)


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Return what was not finite stands as ``None`` in files."""
    return [math.nan if value is None else value for value in values]


def _short(readers: tuple[str, ...]) -> str:
    names = [name.rpartition(".")[2] for name in readers]
    return ", ".join(dict.fromkeys(names))
