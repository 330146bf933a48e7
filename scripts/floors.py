"""Write the table of floors, made from the import contract in pyproject.toml and the packages' own first lines.

    python scripts/floors.py    # into CONTRIBUTING.md and docs/reference/index.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "reference" / "index.md")
_START, _END = "<!-- floors: written by scripts/floors.py -->", "<!-- end of floors -->"


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


def table() -> str:
    """Return the table in Markdown; the lowest floor has number 1."""
    rows = ["| floor | package or module | what lives there |", "|---|---|---|"]
    found = floors()
    for position, names in enumerate(found):
        number = str(len(found) - position)
        for name in names:
            rows.append(f"| {number} | `{name}` | {sentence(name)} |")
            number = ""
    return "\n".join(rows)


def page(text: str) -> str:
    """Return a page with the table between its marks."""
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}\n{table()}\n{_END}{after}"


def main() -> None:
    """Rewrite the pages."""
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
