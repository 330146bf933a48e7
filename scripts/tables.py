"""Write the tables on pages that the code knows: floors from the import contract, export formats from their classes.

python scripts/tables.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

from omniquant_pl.export import FORMATS

ROOT = Path(__file__).resolve().parent.parent


def floors() -> list[list[str]]:
    """Return the names of the packages and modules of each floor, the top one first."""
    layers = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert layers is not None
    return [re.findall(r"\(omniquant_pl\.(\w+)\)", line) for line in layers[1].splitlines()]


def sentence(name: str) -> str:
    """Return the first line of a package's or module's docstring."""
    folder = ROOT / name if name == "callbacks" else ROOT / "omniquant_pl" / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    found = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert found is not None
    return found.splitlines()[0].replace("``", "`")


def floors_table() -> str:
    """Return the floors in Markdown; the lowest one has number 1."""
    rows = ["| floor | package or module | what lives there |", "|---|---|---|"]
    found = floors()
    for position, names in enumerate(found):
        rows += [f"| {len(found) - position} | `{name}` | {sentence(name)} |" for name in names]
    return "\n".join(rows)


def formats_table() -> str:
    """Return the export formats in Markdown."""
    rows = ["| format | weights | activations | loaded by |", "|---|---|---|---|"]
    for name, kind in FORMATS.items():
        limits = kind.limits
        rows.append(f"| `{name}` | {limits.weights} | {limits.activations or 'none'} | {limits.loaded_by} |")
    return "\n".join(rows)


TABLES: dict[str, tuple[Callable[[], str], tuple[Path, ...]]] = {
    "floors": (floors_table, (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "reference" / "index.md")),
    "formats": (formats_table, (ROOT / "docs" / "exports.md",)),
}
"""What makes each table, and the pages that hold it between its marks."""


def page(text: str, name: str) -> str:
    """Return a page with a table between its marks."""
    start, end = f"<!-- {name}: written by scripts/tables.py -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{TABLES[name][0]()}\n{end}{after}"


def main() -> None:
    """Rewrite the pages."""
    for name, (_, paths) in TABLES.items():
        for path in paths:
            path.write_text(page(path.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
