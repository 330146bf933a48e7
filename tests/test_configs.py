"""Every preset parses, builds its objects, and says what the paper says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from omniquant_pl.cli.program import run
from omniquant_pl.data import CalibrationData
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
PRESETS = [path for path in CONFIGS if path.parent == FOLDER]
BEST = [path for path in CONFIGS if path.parent.name == "best"]
FAST = [path for path in CONFIGS if path.parent.name == "fast"]


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_presets_are_those_of_the_design() -> None:
    assert {path.stem for path in PRESETS} == {
        *("w2a16", "w2a16g64", "w2a16g128", "w3a16", "w3a16g128", "w4a16", "w4a16g128"),
        *("w6a6", "w4a4", "w8a8"),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_first_line_is_the_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == f"# python train.py fit --config {name_of(path)}"


@pytest.fixture
def build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], tuple[SequentialTrainer, OmniQuantModel, CalibrationData]]:
    """What a configuration's command builds, stopped before any work."""
    built: list[Any] = []

    def fit_impl(trainer: Any, model: Any, _: Any, __: Any, data: Any, *___: Any) -> None:
        built.extend((trainer, model, data))

    def build(path: Path) -> tuple[SequentialTrainer, OmniQuantModel, CalibrationData]:
        command = path.read_text().splitlines()[0].removeprefix("# python train.py ")
        run(command.split())
        assert list(tmp_path.iterdir()) == []
        trainer, model, data = built
        assert trainer.run_folder.path == Path("runs") / Path(name_of(path)).with_suffix("")
        return trainer, model, data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SequentialTrainer, "_fit_impl", fit_impl)
    # On a machine with several devices it would start this program once for each.
    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", lambda launcher: None)
    return build


@pytest.mark.parametrize("path", PRESETS, ids=name_of)
def test_settings_are_the_published_ones(path: Path, build: Any) -> None:
    """METHOD, published settings, for the LLaMA family."""
    trainer, model, data = build(path)
    assert model.scheme.name == path.stem
    weight_bits, activation_bits = map(int, re.findall(r"[wa](\d+)", path.stem))
    assert trainer.epochs_per_block == (40 if weight_bits == 2 else 20)
    assert model.objective.aug_loss is (weight_bits == 2)
    assert model.clipping.lr == 1e-2
    assert (model.transform is None) is (activation_bits == 16)
    if model.transform is not None:
        assert (model.transform.lr, model.transform.alpha) == (5e-3, 0.5)
    assert (data.samples, data.batch_size, data.shuffle) == (128, 1, False)
    assert (model.rounding.method, model.rotation, model.objective.output_loss) == ("nearest", None, "mse")
    assert (model.objective.window.blocks, model.learning.schedule.is_constant) == (1, True)


@pytest.mark.parametrize("path", BEST, ids=name_of)
def test_best_presets_are_named_after_their_scheme(path: Path, build: Any) -> None:
    _, model, _ = build(path)
    assert model.scheme.name == path.stem
    assert path.stem in {preset.stem for preset in PRESETS} | {"w4a16g64"}


@pytest.mark.parametrize("path", FAST, ids=name_of)
def test_fast_presets_are_the_published_ones_in_a_quarter_of_the_steps(path: Path) -> None:
    fast, published = (yaml.safe_load(each.read_text()) for each in (path, FOLDER / path.name))
    assert 4 * fast["trainer"]["max_epochs"] == published["trainer"]["max_epochs"]
    assert fast["data"] == published["data"]
    learning = fast["model"].pop("learning")
    assert learning["compile"] is True
    if "schedule" in learning:
        for section in ("clipping", "transform"):
            assert fast["model"][section]["lr"] == 4 * published["model"][section]["lr"]
            fast["model"][section]["lr"] = published["model"][section]["lr"]
    assert fast["model"] == published["model"]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in PRESETS + BEST + FAST], ids=name_of)
def test_every_option_beyond_the_paper_parses(path: Path, build: Any) -> None:
    _, model, _ = build(path)
    assert model.scheme.name in ("w2a16g64", "w4a4")
