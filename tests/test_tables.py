"""The tables on pages are those of the import contract and of the export formats."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "tables.py")
assert SPEC is not None
assert SPEC.loader is not None
TABLES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TABLES)
PAGES = [(name, path) for name, (_, paths) in TABLES.TABLES.items() for path in paths]


@pytest.mark.parametrize(("name", "path"), PAGES, ids=[f"{name}-{path.name}" for name, path in PAGES])
def test_pages_are_up_to_date(name: str, path: Path) -> None:
    assert TABLES.page(path.read_text(), name) == path.read_text(), "run python scripts/tables.py"


def test_every_package_has_a_floor() -> None:
    folders = {path.parent.name for path in (ROOT / "omniquant_pl").glob("*/__init__.py")} | {"callbacks"}
    modules = {path.stem for path in (ROOT / "omniquant_pl").glob("*.py")} - {"__init__"}
    assert {name for floor in TABLES.floors() for name in floor} == folders | modules


def test_the_root_has_few_modules() -> None:
    assert len(list((ROOT / "omniquant_pl").glob("*.py"))) <= 7  # six, and the package's own
