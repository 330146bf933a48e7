"""One finished run that all tests here look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from omniquant_pl.cli.program import run


class Finished(NamedTuple):
    """A run: the model's folder and that of the run, from the command line."""

    model: Path
    folder: Path
    metrics: dict[str, Any]
    page: str


@pytest.fixture(scope="session")
def finished(
    make_llama: Callable[..., Path], token_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    model, folder = make_llama(num_key_value_heads=2), tmp_path_factory.mktemp("report") / "run"
    options = {
        "model.path": model,
        "data.dataset": token_files[0],
        "data.samples": 6,
        "data.evaluation": f"[{token_files[1]}, {token_files[0]}]",
        "trainer.max_epochs": 3,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder,
        "progress.quiet": "true",
        "export.format": "null",
    }
    run(["fit", "--config", "w4a4.yaml", *(f"--{key}={value}" for key, value in options.items())])
    metrics = json.loads((folder / "metrics.json").read_text())
    return Finished(model, folder, metrics, (folder / "report.html").read_text(encoding="utf-8"))
