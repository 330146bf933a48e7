"""Small pictures as inline SVG whose colours are the page's, light or dark, and whose text is the page's font."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BASELINE", "CALIBRATED", "DETAIL", "Panel", "depth_colour", "panel"]

# Drawn in these, which a style sheet's variables then replace: a picture follows the page when it turns dark.
CALIBRATED, BASELINE, DETAIL = "#0c0c01", "#0c0c02", "#0c0c03"
_INK, _MUTED, _GRID = "#0c0c04", "#0c0c05", "#0c0c06"
_VARIABLES = {
    CALIBRATED: "--calibrated",
    BASELINE: "--baseline",
    DETAIL: "--detail",
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
}

_SIZE = (5.0, 3.0)
"""Inches of 72 dots: 360 wide, so that a telephone shows it without making the text smaller."""

_MARGINS = {"left": 0.13, "right": 0.99, "bottom": 0.17, "top": 0.96}
"""The same for all: to measure the words first takes longer than to draw."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "omniquant",
    "font.size": 11,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.03,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
}


class Panel:
    """One picture with its words; ``svg`` is there once it is drawn.

    Args:
        title: What it shows, which stands above it.
        note: What to see in it, which stands below.
    """

    def __init__(self, title: str, note: str = "") -> None:
        self.title = title
        self.note = note
        self.svg = ""


@contextmanager
def panel(title: str, note: str = "", x: str = "") -> Iterator[tuple[Panel, Axes]]:
    """Give axes to draw on; the panel holds the picture when the context ends.

    Args:
        title: What it shows.
        note: What to see in it.
        x: Label of the horizontal axis.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = Panel(title, note)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE)
        figure.subplots_adjust(**_MARGINS)
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        yield drawn, axes
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn.svg = _inline(buffer.getvalue(), title)


def depth_colour(position: float) -> str:
    """Return the colour of a block from the first (0) to the last (1), which is seen on light and on dark."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return str(to_hex(mpl.colormaps["plasma"](0.32 + 0.48 * position)))


def _inline(svg: str, title: str) -> str:
    """Make a part of a page of what stands alone: no header, colours by variables, names that no other picture has."""
    prefix = re.sub(r"\W+", "-", title.lower()) + "-"
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">', svg
    )
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
