"""Every preset parses, builds its objects, and says what the paper says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from omniquant_pl.cli import run
from omniquant_pl.data import CalibrationData
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
PRESETS = [path for path in CONFIGS if path.parent.name == "configs"]


def test_presets_are_those_of_the_design() -> None:
    assert {path.stem for path in PRESETS} >= {
        *("w2a16", "w2a16g64", "w2a16g128", "w3a16", "w3a16g128", "w4a16", "w4a16g128"),
        *("w6a6", "w4a4", "w8a8"),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_first_line_is_the_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == f"# python train.py fit --config {path.name}"


class TestInstantiated:
    @pytest.fixture(params=PRESETS, ids=lambda path: path.stem)
    def path(self, request: pytest.FixtureRequest) -> Path:
        return Path(request.param)

    @pytest.fixture
    def built(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[SequentialTrainer, OmniQuantModel, CalibrationData]:
        """What the command builds, stopped before any work."""
        built: list[Any] = []

        def fit_impl(trainer: Any, model: Any, _: Any, __: Any, data: Any, *___: Any) -> None:
            built.extend((trainer, model, data))

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(SequentialTrainer, "_fit_impl", fit_impl)
        command = path.read_text().splitlines()[0].removeprefix("# python train.py ")
        run(command.split())
        assert list(tmp_path.iterdir()) == []
        trainer, model, data = built
        return trainer, model, data

    def test_scheme_is_the_name(self, path: Path, built: Any) -> None:
        trainer, model, _ = built
        assert model.scheme.name == path.stem.removesuffix("-rotated")
        assert (model.rotation is not None) is path.stem.endswith("-rotated")
        assert trainer.run_folder.path == Path("runs") / path.stem

    def test_settings_are_the_published_ones(self, path: Path, built: Any) -> None:
        """METHOD, published settings, for the LLaMA family."""
        trainer, model, data = built
        weight_bits, activation_bits = map(int, re.findall(r"[wa](\d+)", path.stem))
        assert trainer.epochs_per_block == (40 if weight_bits == 2 else 20)
        assert model.aug_loss is (weight_bits == 2)
        assert model.clipping.lr == 1e-2
        assert (model.transform is None) is (activation_bits == 16)
        if model.transform is not None:
            assert (model.transform.lr, model.transform.alpha) == (5e-3, 0.5)
        assert (data.samples, data.batch_size, data.shuffle) == (128, 1, False)
