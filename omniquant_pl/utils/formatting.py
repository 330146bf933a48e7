"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["duration", "format_bytes", "format_seconds", "number", "scientific", "small"]

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def format_bytes(count: float) -> str:
    """Return 1234567 as ``1.23 MB``."""
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """Return 4000 as ``1 h 7 min``, 216 as ``3 min 36 s`` and 5.2 as ``5.2 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def duration(seconds: float) -> str:
    """Return 4000 as ``1 h 7 min``, 216 as ``4 min`` and 5.2 as ``5 s``, for a line of the terminal."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None) -> str:
    """Return a number with two places; ``not finite`` of what stands as null in files."""
    if value is None:
        return "not finite"
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.2e}"


def scientific(value: float | None) -> str:
    """Return 0.000123 as ``1.23e-04``."""
    return "not finite" if value is None else f"{value:.2e}"


def small(value: float | None) -> str:
    """Return 0.0612 as ``0.061``, 0.000123 as ``1.2e-04``; ``not finite`` of what is null in files."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 1 else f"{value:.4g}"
    return f"{value:.1e}"
