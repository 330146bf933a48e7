"""How rows read, on a terminal and in Markdown."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console

from omniquant_pl.compare.row import Row, comparison_table, markdown_table, row_of

ROWS = [
    Row("rtn", "RTN", {"wiki": 6.128}, 3.25, 1_500_000, 12.34, {"host": 2_000_000_000, "device": 0}),
    Row("paper", "paper", {"wiki": None}, 3.25, 1_500_000, 5.0, {"host": 1_000_000, "device": 3_000_000}, "a | note"),
    Row("awq", "AWQ", note="pip install 'omniquant-pl[bnb]'"),
]


def test_markdown() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| method | wiki | bits a weight | MB | s | peak MB | note |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        "| RTN | 6.13 | 3.25 | 1.50 | 12.3 | 2000 |  |",
        "| paper | not finite | 3.25 | 1.50 | 5.0 | 1 + 3 (device) | a / note |",
        "| AWQ |  |  |  |  |  | pip install 'omniquant-pl[bnb]' |",
    ]


def test_terminal_of_eighty_columns() -> None:
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(comparison_table(ROWS))
    lines = captured.get().splitlines()
    assert any("RTN" in line and "6.13" in line and "12.3" in line for line in lines)
    assert "(2) pip install 'omniquant-pl[bnb]'" in lines  # and no markup of rich
    assert any(line.startswith("│ AWQ (2)") for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_row_survives_its_file() -> None:
    assert row_of(asdict(ROWS[1])) == ROWS[1]
    assert row_of({"method": "of another version"}) is None
