"""Other tools, where they are installed beside this package."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from omniquant_pl.compare.backends import Backend
from omniquant_pl.compare.measured import measure_apart
from omniquant_pl.compare.method import Method, MethodInputs
from omniquant_pl.compare.process import run_logged
from omniquant_pl.compare.row import Row
from omniquant_pl.errors import CalibrationError
from omniquant_pl.evaluate import model_sizes
from omniquant_pl.quant.storage import bits_per_weight

__all__ = ["BackendMethod"]


class BackendMethod(Method):
    """A method of another tool. It hands back a plain model, which is measured as every other.

    Args:
        peer: The tool and its method.
    """

    def __init__(self, peer: Backend) -> None:
        self.name = peer.name.replace(" ", "-").lower()
        self.title = peer.name
        self._peer = peer

    @property
    def _version(self) -> str | None:
        try:
            return version(self._peer.package)
        except PackageNotFoundError:
            return None

    @override
    def refusal(self, bench: MethodInputs) -> str | None:
        weights = bench.model.scheme.weights
        if bench.model.scheme.activations is not None:
            return "it is asked for weights alone"
        if weights.symmetric or weights.bits_of:
            return "it is asked for asymmetric codes of one width"
        return None if self._version else f"not installed: pip install {self._peer.package}"

    @override
    def decides(self, bench: MethodInputs) -> Mapping[str, Any]:
        return {"peer": self._peer.name, "version": self._version, "weights": bench.config["model"]["weights"]}

    @override
    def measure(self, bench: MethodInputs, folder: Path) -> Row:
        model, weights, calibration = folder / "model", bench.model.scheme.weights, folder / "calibration.npy"
        np.save(calibration, bench.calibration.numpy())
        command = [sys.executable, "-m", self._peer.module, f"--method={self._peer.method}", f"--bits={weights.bits}"]
        command += [f"--model={bench.model.source.folder}", f"--calibration={calibration}", f"--output={model}"]
        command += [] if weights.group_size is None else [f"--group-size={weights.group_size}"]
        finished = run_logged(command, folder / "log.txt")
        if finished.failure is not None:
            raise CalibrationError(finished.failure)
        perplexities = measure_apart(bench, folder, model)["perplexity"]
        shutil.rmtree(model)  # in float32, it is several times as large as the original
        return Row(
            self.name,
            self.title,
            perplexities,
            bits_per_weight(bench.model.quantized_weights.values()),
            model_sizes(bench.model)["quantized"],
            finished.seconds,
            {"host": finished.host_bytes, "device": 0},
        )
