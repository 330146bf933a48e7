"""Truncated files and flipped bits: found or harmless, never a silent wrong result, never a lost finished block.

A few random cases run by default; OMNIQUANT_DAMAGE=100 runs as many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted import PowerCutError, blocks_of

from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.callbacks import CheckpointCallback, MetricsCallback
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import BudgetSpec, ObjectiveSpec, WindowSpec
from omniquant_pl.trainer import SequentialTrainer

CASES = int(os.environ.get("OMNIQUANT_DAMAGE", "12"))
BLOCKS = 4


class CutInTheLastWindow(CalibrationCallback):
    """Ends everything behind a checkpoint there."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.index >= BLOCKS - 2 and pl_module.epoch_losses:
            raise PowerCutError


Calibrate = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


SETTINGS: dict[str, dict[str, Any]] = {
    "disk": {"activation_budget": BudgetSpec(device=0, host=0)},
    "windows": {"objective": ObjectiveSpec(window=WindowSpec(blocks=2))},
}


@pytest.fixture
def calibrate(make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer]) -> Calibrate:
    folder = make_llama(num_hidden_layers=BLOCKS)

    def calibrate(root: Path, settings: str, ckpt_path: str | None = None, cut: bool = False) -> RunFolder:
        callbacks = [MetricsCallback(), CheckpointCallback(every_n_steps=2), *([CutInTheLastWindow()] if cut else [])]
        model = OmniQuantModel(str(folder), **SETTINGS[settings])
        fit(model, callbacks, {"batch_size": 2}, ckpt_path, max_epochs=2, default_root_dir=root)
        return RunFolder(root)

    return calibrate


def damage(path: Path, choice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if choice.random() < 0.5:
        left = choice.randrange(len(content))
        path.write_bytes(content[:left])
        return f"{path.name} cut to {left} of {len(content)} bytes"
    bit = choice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name} flipped"


def results_of(run: RunFolder) -> list[float]:
    """What was measured of the blocks, and the perplexities."""
    metrics = json.loads(run.metrics.read_text())
    blocks = [
        (entry["relative_error"], entry["relative_error_rtn"], entry["loss_final"]) for entry in metrics["blocks"]
    ]
    return [*(value for entry in blocks for value in entry), *metrics["perplexity"]["evaluation"].values()]


def refusal_of(work: Callable[[], object]) -> str | None:
    try:
        work()
    except ConfigurationError as error:
        return str(error)
    return None


@pytest.fixture
def interrupted(runs: Path, calibrate: Calibrate) -> Callable[[str], tuple[Path, RunFolder]]:
    """An interrupted run, and one that was not; made once for each settings."""

    def interrupted(settings: str) -> tuple[Path, RunFolder]:
        whole, cut = runs / f"{settings}-whole", runs / f"{settings}-cut"
        if not cut.exists():
            calibrate(whole, settings)
            with pytest.raises(PowerCutError):
                calibrate(cut, settings, cut=True)
        return cut, RunFolder(whole)

    return interrupted


@pytest.mark.parametrize("case", range(CASES))
def test_damage_is_found_or_harmless(
    interrupted: Callable[[str], tuple[Path, RunFolder]], calibrate: Calibrate, tmp_path: Path, case: int
) -> None:
    choice = random.Random(case)
    settings = list(SETTINGS)[case % len(SETTINGS)]
    cut, whole = interrupted(settings)
    expected, results = blocks_of(whole), results_of(whole)
    run = RunFolder(shutil.copytree(cut, tmp_path / "run"))
    files = sorted(path for path in run.path.rglob("*") if path.is_file() and path.stat().st_size)
    kinds = sorted({(path.parent.name, path.suffix) for path in files})
    kind = kinds[case // len(SETTINGS) % len(kinds)]
    path = choice.choice([path for path in files if (path.parent.name, path.suffix) == kind])
    what = damage(path, choice)
    untouched = {found.name: found.stat().st_mtime_ns for found in run.blocks.iterdir() if found != path}
    refusal = refusal_of(lambda: calibrate(run.path, settings, "last"))
    if refusal is not None:
        assert path.name in refusal, what
        return
    if settings == "windows" and path.name.startswith("window"):  # what a window has learned is in no other file
        assert blocks_of(run).keys() == expected.keys()
    else:
        assert blocks_of(run) == expected, what
        assert results_of(run) == pytest.approx(results, rel=1e-6), what
    if settings != "windows":
        assert all((run.blocks / name).stat().st_mtime_ns == time for name, time in untouched.items()), what
