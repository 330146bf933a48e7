"""Words that several refusals share."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["did_you_mean", "either"]


def either(names: Sequence[str]) -> str:
    """Return ``a, b or c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def did_you_mean(names: Sequence[str]) -> str:
    """Return a question behind a semicolon, empty where nothing is alike."""
    return f"; did you mean {either(names)}?" if names else ""
