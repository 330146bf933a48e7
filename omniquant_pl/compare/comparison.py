"""Runs the methods one after the other, keeps what is finished, and writes ``compare.json`` and ``compare.md``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from omniquant_pl import __version__
from omniquant_pl.compare.backend_method import BackendMethod
from omniquant_pl.compare.backends import BACKENDS
from omniquant_pl.compare.fit_method import Fit
from omniquant_pl.compare.measured import BitsAndBytes, FullPrecision
from omniquant_pl.compare.method import Method, MethodInputs
from omniquant_pl.compare.recipes import RECIPES
from omniquant_pl.compare.row import Row, markdown_table, row_of
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.run.fingerprint import digest_of, model_digest
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_json, write_text

__all__ = ["Comparison", "MethodName"]

MethodName = Literal[
    "rtn",
    "smoothquant",
    "awq",
    "gptq",
    "nf4",
    "int8",
    "paper",
    "best",
    "auto-round",
    "gptqmodel",
    "llm-compressor-gptq",
    "llm-compressor-awq",
]


def _contenders() -> dict[str, Method]:
    own = [Fit(name, method) for name, method in RECIPES.items()]
    others = [BitsAndBytes(name) for name in ("nf4", "int8")]
    entries: list[Method] = [*own, *others, *(BackendMethod(peer) for peer in BACKENDS)]
    by_name = {entry.name: entry for entry in entries}
    return {name: by_name[name] for name in get_args(MethodName)}


class Comparison:
    """A model by several methods.

    Args:
        bench: What is the same for all.
        folder: The run folder.
    """

    def __init__(self, bench: MethodInputs, folder: Path) -> None:
        self._bench = bench
        self._json = folder / "compare.json"
        self._markdown = folder / "compare.md"
        self._work = RunFolder(folder).comparison
        self._console = Console(highlight=False, soft_wrap=True)

    def run(self, methods: Sequence[str] | None = None) -> list[Row]:
        """Run what is missing.

        Args:
            methods: Their names, in the order of the rows; ``None`` for all. Full precision comes first.

        Returns:
            One row a method; those of earlier comparisons that still hold stay in the file.

        Raises:
            ConfigurationError: If there is no such method, or one is named twice.
        """
        contenders = _contenders()
        names = list(contenders) if methods is None else list(methods)
        if not names or len(set(names)) < len(names):
            raise ConfigurationError("methods", f"{names} names none, or one twice; accepted: {', '.join(contenders)}")
        contenders = {entry.name: entry for entry in (FullPrecision(), *contenders.values())}
        chosen = [FullPrecision.name, *names]
        rows = self._kept(contenders)
        for name in chosen:
            if name in rows:
                self._console.print(f"{rows[name].title}: measured before")
            else:
                rows[name] = self._row(contenders[name])
            self._write([rows[method] for method in contenders if method in rows])
        return [rows[name] for name in chosen]

    def _row(self, contender: Method) -> Row:
        empty = Row(contender.name, contender.title)
        reason = contender.refusal(self._bench)
        if reason is not None:
            return replace(empty, note=reason)
        fingerprint = self._fingerprint(contender)
        folder = self._folder(contender, fingerprint)
        self._console.print(f"{contender.title}: running, log in {folder}")
        try:
            row = contender.measure(self._bench, folder)
        except CalibrationError as error:
            return replace(empty, note=f"failed: {error}")
        return replace(row, note=contender.note, fingerprint=fingerprint)

    def _fingerprint(self, contender: Method) -> str:
        """Digest of all that decides a method's numbers."""
        bench = self._bench
        parts = {
            "method": contender.name,
            "decides": contender.decides(bench),
            "model": model_digest(bench.model.source.folder),
            "tokens": digest_of({f"evaluation {name}": found for name, found in bench.evaluation.items()}),
            "calibration": digest_of({"": bench.calibration}),
            "version": __version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _folder(self, contender: Method, fingerprint: str) -> Path:
        """Return the method's folder, with what an interrupted attempt at the same has left, and nothing else."""
        folder = self._work / contender.name
        mark = folder / "fingerprint"
        if not (mark.is_file() and mark.read_text() == fingerprint):
            shutil.rmtree(folder, ignore_errors=True)
            write_text(mark, fingerprint)
        return folder

    def _kept(self, contenders: Mapping[str, Method]) -> dict[str, Row]:
        """Return the rows of an earlier comparison that still hold, by method; none if the file is damaged."""
        try:
            content: dict[str, Any] = json.loads(self._json.read_text(encoding="utf-8"))
            found = [row_of(entry) for entry in content["rows"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}
        return {row.method: row for row in found if row is not None and self._holds(row, contenders.get(row.method))}

    def _holds(self, row: Row, contender: Method | None) -> bool:
        if contender is None or not row.is_measured or contender.refusal(self._bench) is not None:
            return False
        return row.fingerprint == self._fingerprint(contender)

    def _write(self, rows: Sequence[Row]) -> None:
        model, data = self._bench.model, self._bench.config["data"]
        tokens = " x ".join(str(size) for size in self._bench.calibration.shape)
        head = {"model": model.path, "scheme": model.scheme.name, "data": f"{tokens} tokens of {data['dataset']}"}
        write_json(self._json, {**head, "rows": [asdict(row) for row in rows]})
        text = f"# {model.path}, {model.scheme.name}\n\nCalibrated on {head['data']}.\n\n{markdown_table(rows)}"
        write_text(self._markdown, text)
