"""Count what a newcomer meets in the package: doors, floors, arrows, names.

python scripts/house.py            # this checkout
python scripts/house.py OTHER      # another checkout beside it, for a comparison
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

PACKAGE = "omniquant_pl"
MAIN_PATHS = (
    "cli trainer.sequential trainer.run calibration engine hooks block quantized_block factors model callbacks.fold",
    """cli.program trainer.sequential trainer.block_trainer trainer.run_trainer calibration.loop calibration.engine
    calibration.hooks blocks.module blocks.quantized_block blocks.factors model callbacks.fold""",
)
"""Modules that a reader of one fit passes through, from the command line to a folded block, before and after the
package was put into rooms."""
PROBES = {"family": "qwen3", "export format": "mlc", "training option": "weight_decay"}
"""A word of each kind of extension: the files that hold it are the places that such an extension touches."""


def modules(root: Path) -> dict[str, Path]:
    """Return the files of the package by dotted name without the package's own."""
    found = {}
    for folder, prefix in ((root / PACKAGE, ""), (root / "callbacks", "callbacks.")):
        for path in sorted(folder.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module, without the package's name, and name of every import of an own name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            for alias in node.names:
                yield node.module.removeprefix(f"{PACKAGE}."), alias.name


def counts(root: Path) -> dict[str, object]:
    """Return what is counted, by what it is."""
    files = modules(root)
    rooms, inside = nx.DiGraph(), nx.DiGraph()
    for name, path in files.items():
        for target, _ in imports(path):
            owner = target if target in files else target.rpartition(".")[0]
            inside.add_edge(name, owner or target)
            if name.partition(".")[0] != target.partition(".")[0]:
                rooms.add_edge(name.partition(".")[0], target.partition(".")[0])
    circles = [sorted(found) for found in nx.strongly_connected_components(inside) if len(found) > 1]
    path_names = next(
        found for found in (each.split() for each in reversed(MAIN_PATHS)) if all(name in files for name in found)
    )
    own = {name for each in path_names for _, name in imports(files[each])}
    basenames = Counter(name.rpartition(".")[2] for name in path_names)
    contract = re.search(r"^layers = \[\n(.*?)^\]", (root / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    entries = [path for path in (root / PACKAGE).iterdir() if path.suffix in ("", ".py") and path.name != "__pycache__"]
    lines = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return {
        "root entries": len(entries),
        "of them modules": sum(path.suffix == ".py" for path in entries),
        "layers of the contract": len(contract[1].splitlines()) if contract else 0,
        "circles": circles or 0,
        "arrows between rooms": rooms.number_of_edges(),
        "own names imported on the main path": len(own),
        "duplicate basenames on the main path": sorted(name for name, count in basenames.items() if count > 1) or 0,
        **{
            f"files with {word!r} ({kind})": sum(word in text for text in lines.values())
            for kind, word in PROBES.items()
        },
    }


def main() -> None:
    """Print the counts, of two checkouts side by side if another is given."""
    columns = [counts(root) for root in (*map(Path, sys.argv[1:2]), Path(__file__).resolve().parent.parent)]
    for key in columns[-1]:
        print(f"{key:42}", *(f"{column[key]!s:>8}" for column in columns))


if __name__ == "__main__":
    main()
