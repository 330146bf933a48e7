"""Lines fit a terminal of 80 columns, and no number looks broken."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniquant_pl.callbacks.progress_lines import block_line, divergence, encodable, finish_lines
from omniquant_pl.utils.formatting import duration, small

NUMBERS = st.none() | st.just(math.nan) | st.floats(min_value=0, allow_infinity=True)
SECONDS = st.floats(min_value=0, max_value=3.5e5)  # four days


@given(NUMBERS, NUMBERS, SECONDS, st.none() | SECONDS, st.integers(1, 200), st.booleans())
def test_a_block_takes_a_line(
    error: float | None, nearest: float | None, took: float, left: float | None, count: int, learns_predictions: bool
) -> None:
    block = {"index": count - 1, "relative_error": error, "relative_error_rtn": nearest, "seconds": took}
    objective = divergence([12.34567, 0.000123456]) if learns_predictions else None
    line = block_line(block, count, left, objective)
    is_finite = all(each is not None and math.isfinite(each) for each in (error, nearest))
    assert len(line) <= (80 if objective is None and is_finite else 115)
    assert line.startswith(f"block {count}/{count} · ")
    assert not re.search(r"nan|inf|None", line)


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_small_numbers_keep_two_digits(value: float) -> None:
    assert float(small(value)) == pytest.approx(value, rel=0.06)
    assert len(small(value)) <= 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_says_so(value: float | None) -> None:
    assert small(value) == "not finite"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "1 s"),
        (5.2, "5 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (216, "4 min"),
        (3590, "1 h 0 min"),
        (4000, "1 h 7 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_terminal_that_knows_ascii_alone() -> None:
    assert encodable("error 0.1 · 5 s → ü", "ascii") == "error 0.1 - 5 s -> ?"
    assert encodable("error 0.1 · 5 s → ü", "utf-8") == "error 0.1 · 5 s → ü"


def test_the_end_names_what_there_is(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(1500))
    metrics = {
        "size_bytes": {"full_precision": 4.7e9, "quantized": 1.2e9},
        "perplexity": {"wikitext2": {"full_precision": 5.47, "round_to_nearest": None, "quantized": 5.7}},
    }
    lines = list(finish_lines("Llama-2-7b-hf", "w4a16g128", metrics, model, Path("my runs/config.yaml"), 4000, True))
    assert lines[0] == "finished: Llama-2-7b-hf to w4a16g128 · 1 h 7 min"
    assert lines[1] == f"size: 4.7 GB → 1.2 GB packed · 1.5 kB in {model}"
    assert lines[2] == "perplexity, wikitext2: full precision 5.47 · RTN not finite · calibrated 5.70"
    assert lines[3].endswith("generate --config 'my runs/config.yaml' --prompt Once")
    assert all(len(line) <= 80 for line in (lines[0], lines[2]))


def test_a_run_without_measurements(tmp_path: Path) -> None:
    lines = list(finish_lines("m", "w4a4", {}, None, tmp_path / "config.yaml", 5, False))
    assert [line.split(":")[0] for line in lines] == ["finished", "next"]
