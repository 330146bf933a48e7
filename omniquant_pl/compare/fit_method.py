"""Methods that are settings of this project's own fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from omniquant_pl.compare.method import Method, MethodInputs
from omniquant_pl.compare.process import run_logged
from omniquant_pl.compare.recipes import Case, Recipe, Settings, configuration
from omniquant_pl.compare.row import Row
from omniquant_pl.errors import CalibrationError
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_text

__all__ = ["Fit"]


class Fit(Method):
    """A fit of its own, which goes on where an earlier one was interrupted.

    Args:
        name: The method's name.
        method: Its settings.
    """

    def __init__(self, name: str, method: Recipe) -> None:
        self.name = name
        self.title = method.title
        self._method = method

    def _settings(self, bench: MethodInputs) -> Settings | str:
        return self._method.settings(Case(bench.model.scheme, str(bench.model.source.config_json["model_type"])))

    @override
    def refusal(self, bench: MethodInputs) -> str | None:
        settings = self._settings(bench)
        return settings if isinstance(settings, str) else None

    @override
    def decides(self, bench: MethodInputs) -> Mapping[str, Any]:
        settings = self._settings(bench)
        assert not isinstance(settings, str)
        return configuration(bench.config, settings)

    @override
    def measure(self, bench: MethodInputs, folder: Path) -> Row:
        config = json.loads(json.dumps(self.decides(bench)))  # plain values, without the anchors of shared ones
        config["trainer"]["default_root_dir"] = str(folder)
        config |= {"export": {"format": None}, "progress": {"quiet": True}}
        path = folder / "fit.yaml"
        write_text(path, yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "omniquant_pl", "fit", f"--config={path}", "--ckpt_path=last"]
        finished = run_logged(command, folder / "log.txt")
        if finished.failure is not None:
            raise CalibrationError(finished.failure)
        metrics = RunFolder(folder).read_metrics()
        return Row(
            self.name,
            self.title,
            {name: values["quantized"] for name, values in metrics["perplexity"].items()},
            metrics["bits_per_weight"],
            metrics["size_bytes"]["quantized"],
            metrics["seconds"]["calibration"],
            metrics["peak_memory_bytes"],
        )
