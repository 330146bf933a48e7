"""Numbers as people read them."""

from __future__ import annotations

import pytest

from omniquant_pl.utils.formatting import format_bytes, format_seconds, number, scientific


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.0 s"),
        (5.25, "5.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (216, "3 min 36 s"),
        (3599.6, "1 h 0 min"),
        (4000, "1 h 7 min"),
        (90000, "25 h 0 min"),
    ],
)
def test_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234567, "1.23 MB"), (999_600, "1 MB"), (13.5e9, "13.5 GB")],
)
def test_bytes(count: float, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(45.3712, "45.37"), (3.8e4, "38000.00"), (2.2e5, "2.20e+05"), (None, "not finite")]
)
def test_numbers(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_scientific() -> None:
    assert scientific(0.000123) == "1.23e-04"
    assert scientific(None) == "not finite"
