"""The commands in the documentation, collected from every page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_PROGRAMS = (
    "python",
    "make",
    "pip",
    "omniquant",
    ".",
    "xdg-open",
    "llama-cli",
    "vllm",
    "mlc_llm",
    "torchrun",
    "srun",
    "sbatch",
)
_VARIABLE = re.compile(r"[A-Z_]+=\S*$")


class Command(NamedTuple):
    """A command as a page shows it, and what it needs beyond this machine: what stands behind its ``#``."""

    page: str
    words: list[str]
    needs: str

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def _commands(page: Path) -> Iterator[Command]:
    text = re.sub(r" *\\\n +", " ", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
        shown, _, comment = re.sub(r"\s{2,}#", "   #", line).partition("   #")
        try:
            words = shlex.split(shown)
        except ValueError:  # a formula
            continue
        while words and _VARIABLE.match(words[0]):
            words = words[1:]
        if words and words[0] in _PROGRAMS:
            yield Command(str(page.relative_to(ROOT)), words, comment.strip())


COMMANDS = [command for page in PAGES for command in _commands(page)]
"""Every command of every page: those that stand indented by four."""
