"""Rows that need no fit: the model as it is, and the formats of bitsandbytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from typing_extensions import override

from omniquant_pl.compare.bits_and_bytes import KINDS, is_installed
from omniquant_pl.compare.measure import AS_IT_IS
from omniquant_pl.compare.method import Method, MethodInputs
from omniquant_pl.compare.process import run_logged
from omniquant_pl.compare.row import Row
from omniquant_pl.errors import CalibrationError

__all__ = ["BitsAndBytes", "FullPrecision", "measure_apart"]

_NOTES = {
    "nf4": "storage of its own: blocks of 64 with a float32 scale; activations are not quantized",
    "int8": "storage of its own: 8 bit a weight and, but for outliers, 8 bit activations",
}


def measure_apart(bench: MethodInputs, folder: Path, model: Path, kind: str = AS_IT_IS) -> dict[str, Any]:
    """Measure a model in a process of its own; see :func:`omniquant_pl.compare.measure.measure`.

    Raises:
        CalibrationError: If that fails.
    """
    result = folder / "measured.json"
    command = [sys.executable, "-m", "omniquant_pl.compare.measure", f"--kind={kind}", f"--model={model}"]
    command += [f"--tokens={bench.write_evaluation(folder)}", f"--output={result}", f"--device={bench.device}"]
    command += ["--trust-remote-code"] if bench.model.trust_remote_code else []
    budget = bench.model.activation_budget
    given = {"device": budget.device, "host": budget.host}
    command += [f"--{place}-gigabytes={size}" for place, size in given.items() if size is not None]
    finished = run_logged(command, folder / "measure.txt")
    if finished.failure is not None:
        raise CalibrationError(finished.failure)
    return dict(json.loads(result.read_text(encoding="utf-8")))


class FullPrecision(Method):
    """The model as it is stored, computed in float32."""

    name = "full_precision"
    title = "full precision"

    @override
    def refusal(self, bench: MethodInputs) -> None:
        return None

    @override
    def decides(self, bench: MethodInputs) -> Mapping[str, Any]:
        return {}

    @override
    def measure(self, bench: MethodInputs, folder: Path) -> Row:
        return Row(self.name, self.title, **measure_apart(bench, folder, bench.model.source.folder))


class BitsAndBytes(Method):
    """A format of bitsandbytes, whatever the scheme.

    Args:
        name: One of :data:`omniquant_pl.compare.bits_and_bytes.KINDS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.title = KINDS[name]
        self.note = _NOTES[name]

    @override
    def refusal(self, bench: MethodInputs) -> str | None:
        return None if is_installed() else "bitsandbytes is not installed: pip install 'omniquant-pl[bnb]'"

    @override
    def decides(self, bench: MethodInputs) -> Mapping[str, Any]:
        return {"bitsandbytes": version("bitsandbytes"), "device": bench.device.partition(":")[0]}

    @override
    def measure(self, bench: MethodInputs, folder: Path) -> Row:
        figures = measure_apart(bench, folder, bench.model.source.folder, self.name)
        return Row(self.name, self.title, **figures)
