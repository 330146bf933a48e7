"""The table of floors on the pages is that of the import contract."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("floors", ROOT / "scripts" / "floors.py")
assert SPEC is not None
assert SPEC.loader is not None
FLOORS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FLOORS)


@pytest.mark.parametrize("path", FLOORS.PAGES, ids=lambda path: path.name)
def test_pages_have_the_table_of_the_contract(path: Path) -> None:
    assert FLOORS.page(path.read_text()) == path.read_text(), "run python scripts/floors.py"


def test_every_package_has_a_floor() -> None:
    folders = {path.parent.name for path in (ROOT / "omniquant_pl").glob("*/__init__.py")} | {"callbacks"}
    modules = {path.stem for path in (ROOT / "omniquant_pl").glob("*.py")} - {"__init__"}
    assert {name for floor in FLOORS.floors() for name in floor} == folders | modules


def test_the_root_has_few_modules() -> None:
    assert len(list((ROOT / "omniquant_pl").glob("*.py"))) <= 6
