"""An interrupted calibration, taken up again, ends with the files of one that was not interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from interrupted import PowerCut, PowerCutError, blocks_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback
from omniquant_pl.callbacks import CheckpointCallback, KeepBestState, MetricsCallback, NumericsGuard
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import (
    ActivationSpec,
    BudgetSpec,
    ClippingSpec,
    LearningSpec,
    ObjectiveSpec,
    RoundingSpec,
    ScheduleSpec,
    TransformSpec,
    WeightSpec,
    WindowSpec,
)
from omniquant_pl.trainer import SequentialTrainer

Fit = Callable[..., SequentialTrainer]

EPOCHS, BATCHES, BLOCKS = 3, 3, 3


SETTINGS: dict[str, dict[str, Any]] = {
    "clipping": {"weights": WeightSpec(bits=3)},
    "w4a4": {"activations": ActivationSpec(bits=4), "transform": TransformSpec(mlp=True)},
    "rounding": {
        "rounding": RoundingSpec("learned"),
        "learning": LearningSpec(ScheduleSpec(warmup=0.2, decay="linear")),
    },
    "gptq": {"rounding": RoundingSpec("gptq"), "objective": ObjectiveSpec(aug_loss=True)},
    "windows": {"objective": ObjectiveSpec(window=WindowSpec(blocks=2)), "rounding": RoundingSpec("learned")},
    "disk": {"activation_budget": BudgetSpec(device=0, host=0), "activation_dtype": "bfloat16"},
    "wide windows": {"objective": ObjectiveSpec(window=WindowSpec(blocks=3, stride=2)), "weights": WeightSpec(bits=2)},
}


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Path]) -> Path:
    return make_llama(num_hidden_layers=BLOCKS)


@pytest.fixture
def calibrate(folder: Path, fit: Fit, tmp_path: Path) -> Callable[..., RunFolder]:
    """Calibrates into a folder by name, once more if it is told to go on."""

    def calibrate(
        name: str | Path,
        settings: dict[str, Any],
        callbacks: list[Callback],
        ckpt_path: str | None = None,
        force: bool = False,
        model: Path = folder,
        data: dict[str, Any] | None = None,
        **options: Any,
    ) -> RunFolder:
        checkpoint = CheckpointCallback(every_n_steps=2, every_minutes=None, force=force)
        guards = [MetricsCallback(), NumericsGuard(), checkpoint]
        root = tmp_path / name
        fit(
            OmniQuantModel(str(model), **settings),
            [*callbacks, *guards],
            data or {"batch_size": 2},
            ckpt_path,
            **{"max_epochs": EPOCHS, "default_root_dir": root, **options},
        )
        return RunFolder(root)

    return calibrate


def results_of(run: RunFolder) -> list[dict[str, Any]]:
    """What was measured, without the time that it took."""
    metrics = json.loads(run.metrics.read_text())
    blocks = [{key: value for key, value in entry.items() if key != "seconds"} for entry in metrics["blocks"]]
    return [*blocks, metrics["perplexity"]["evaluation"]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_cut_again_and_again(calibrate: Callable[..., RunFolder], settings: str) -> None:
    """Before, inside and behind steps, epochs and blocks; each setting has moments of its own."""
    options, position = SETTINGS[settings], list(SETTINGS).index(settings)
    whole = calibrate("whole", options, [KeepBestState()])
    moments = iter([position, *(11 + (position + turn) % 7 for turn in range(20))])

    def go_on() -> RunFolder | None:
        callbacks = [KeepBestState(), PowerCut(next(moments))]
        with suppress(PowerCutError):
            return calibrate("cut", options, callbacks, ckpt_path="last")
        return None

    runs = [go_on(), go_on(), go_on()]
    assert runs == [None, None, None]
    while (again := go_on()) is None:
        pass
    assert blocks_of(again) == blocks_of(whole)
    assert results_of(again) == results_of(whole)


class TestWhatIsThere:
    """Which of the files an earlier run has left count."""

    OPTIONS: dict[str, Any] = SETTINGS["clipping"]

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where runs are that the tests share."""
        return tmp_path_factory.mktemp("runs")

    @pytest.fixture
    def cut(self, calibrate: Callable[..., RunFolder], runs: Path, tmp_path: Path) -> RunFolder:
        """Interrupted inside the last block."""
        if not (runs / "cut").exists():
            with pytest.raises(PowerCutError):
                calibrate(runs / "cut", self.OPTIONS, [PowerCut(64)])
        run = RunFolder(shutil.copytree(runs / "cut", tmp_path / "cut"))
        assert sorted(path.name for path in run.blocks.iterdir()) == ["00000.safetensors", "00001.safetensors"]
        assert run.checkpoint.is_file()
        return run

    def go_on(self, calibrate: Callable[..., RunFolder], **changes: Any) -> RunFolder:
        return calibrate(**({"name": "cut", "settings": self.OPTIONS, "callbacks": [], "ckpt_path": "last"} | changes))

    @pytest.fixture
    def uninterrupted(self, calibrate: Callable[..., RunFolder], runs: Path) -> RunFolder:
        if not (runs / "whole").exists():
            calibrate(runs / "whole", self.OPTIONS, [])
        return RunFolder(runs / "whole")

    @pytest.fixture
    def whole(self, uninterrupted: RunFolder) -> dict[str, bytes]:
        return blocks_of(uninterrupted)

    @pytest.mark.parametrize("name", ["blocks/00000.safetensors", "blocks/00001.safetensors", "last.ckpt"])
    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
    def test_a_damaged_file_costs_what_it_held(
        self,
        cut: RunFolder,
        calibrate: Callable[..., RunFolder],
        whole: dict[str, bytes],
        caplog: pytest.LogCaptureFixture,
        name: str,
        damage: str,
    ) -> None:
        path = cut.path / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 8
        damaged = {"truncated": content[: len(content) // 3], "flipped": content, "empty": b"", "missing": b""}[damage]
        path.write_bytes(damaged)
        if damage == "missing":
            path.unlink()
        assert blocks_of(self.go_on(calibrate)) == whole
        assert damage == "missing" or any(str(path) in record.getMessage() for record in caplog.records)

    def test_a_damaged_block_does_not_cost_those_behind_it(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder]
    ) -> None:
        cut.factor_file(0).write_bytes(b"")
        before = cut.factor_file(1).stat().st_mtime_ns
        self.go_on(calibrate)
        assert cut.factor_file(1).stat().st_mtime_ns == before

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"blocks": [{"index": 0}]}'])
    def test_lost_metrics_are_measured_again(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], uninterrupted: RunFolder, content: str
    ) -> None:
        expected = results_of(uninterrupted)
        cut.metrics.write_text(content)
        run = self.go_on(calibrate)
        assert blocks_of(run) == blocks_of(uninterrupted)
        for found, wanted in zip(results_of(run), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6)

    def test_nothing_there_is_a_start(self, calibrate: Callable[..., RunFolder], whole: dict[str, bytes]) -> None:
        assert blocks_of(self.go_on(calibrate, name="new")) == whole

    def test_without_ckpt_path_it_starts_anew(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], whole: dict[str, bytes]
    ) -> None:
        assert blocks_of(self.go_on(calibrate, ckpt_path=None)) == whole
        previous = sorted(path.name for path in (cut.path / "previous").iterdir())
        assert "last.ckpt" in previous
        assert "blocks" in previous

    @pytest.mark.parametrize("name", ["last.ckpt", "last-previous.ckpt"])
    def test_a_checkpoint_by_its_path(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], whole: dict[str, bytes], name: str
    ) -> None:
        assert blocks_of(self.go_on(calibrate, ckpt_path=str(cut.path / name))) == whole

    def test_a_path_that_is_no_file(self, cut: RunFolder, calibrate: Callable[..., RunFolder]) -> None:
        with pytest.raises(ConfigurationError, match=r"^ckpt_path: .* is not a file"):
            self.go_on(calibrate, ckpt_path=str(cut.path / "other.ckpt"))

    def test_other_tokens_are_refused_unless_forced(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], caplog: pytest.LogCaptureFixture
    ) -> None:
        before = blocks_of(cut)
        other = {"data": {"batch_size": 2, "samples": 4}}
        with pytest.raises(ConfigurationError, match=r"^ckpt_path: .* other calibration tokens; .*checkpoint\.force"):
            self.go_on(calibrate, **other)
        assert blocks_of(cut) == before
        assert self.go_on(calibrate, force=True, **other).factor_file(2).is_file()
        assert "other calibration tokens" in caplog.text

    @pytest.mark.parametrize(
        "change", [{"settings": SETTINGS["w4a4"]}, {"max_epochs": EPOCHS + 1}, {"data": {"batch_size": 3}}]
    )
    def test_other_settings_are_refused(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], change: dict[str, Any]
    ) -> None:
        before = blocks_of(cut)
        with pytest.raises(ConfigurationError, match=r"^ckpt_path: .* other settings; .*checkpoint\.force"):
            self.go_on(calibrate, **change)
        assert blocks_of(cut) == before

    def test_where_streams_are_kept_may_change(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], whole: dict[str, bytes]
    ) -> None:
        moved = self.OPTIONS | {"activation_budget": BudgetSpec(device=0, host=0)}
        assert blocks_of(self.go_on(calibrate, settings=moved)) == whole

    def test_other_model_files_are_refused(
        self, cut: RunFolder, calibrate: Callable[..., RunFolder], make_llama: Callable[..., Path]
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"^ckpt_path: .* other model files"):
            self.go_on(calibrate, model=make_llama(num_hidden_layers=BLOCKS, rms_norm_eps=1e-3))

    def test_two_processes_do_not_share_a_folder(self, cut: RunFolder, calibrate: Callable[..., RunFolder]) -> None:
        with cut.locked(), pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir: another process"):
            self.go_on(calibrate)

    def test_losses_of_an_epoch_count_from_its_start(
        self, calibrate: Callable[..., RunFolder], cut: RunFolder, whole: dict[str, bytes]
    ) -> None:
        seen: dict[str, list[list[float]]] = {}

        class Losses(Callback):
            def __init__(self, name: str) -> None:
                self._name = name

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                seen.setdefault(self._name, []).append(list(pl_module.epoch_losses))

        calibrate("whole2", self.OPTIONS, [Losses("whole")])
        self.go_on(calibrate, callbacks=[Losses("cut")])
        assert seen["cut"] == seen["whole"][-1:]


class CutAtBlock(CalibrationCallback):
    """Ends everything when a block is folded."""

    def __init__(self, index: int) -> None:
        self._index = index

    def on_block_end(self, trainer: Any, block: Any, result: BlockResult) -> None:
        if result.index == self._index:
            raise PowerCutError


def test_a_window_goes_on_however_often_it_is_cut_where_it_advances(
    make_llama: Callable[..., Path], calibrate: Callable[..., RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    """The first block of the second window is folded each time, the next one is not."""
    options: dict[str, Any] = {"model": make_llama(num_hidden_layers=6), "max_epochs": 1}
    settings = {"objective": ObjectiveSpec(window=WindowSpec(blocks=3, stride=2)), "weights": WeightSpec(bits=2)}
    whole = calibrate("whole", settings, [], **options)
    for _ in range(3):
        with pytest.raises(PowerCutError):
            calibrate("cut", settings, [CutAtBlock(2)], ckpt_path="last", **options)
    assert blocks_of(calibrate("cut", settings, [], ckpt_path="last", **options)) == blocks_of(whole)
    assert "is lost" not in caplog.text


def test_the_log_is_kept(calibrate: Callable[..., RunFolder]) -> None:
    settings = SETTINGS["clipping"]
    with pytest.raises(PowerCutError):
        calibrate("cut", settings, [PowerCut(50)], logger=None)
    run = calibrate("cut", settings, [], ckpt_path="last", logger=None)
    lines = [(run.path / "logs" / name).read_text().splitlines() for name in ("metrics-1.csv", "metrics.csv")]
    rows = [line for file in lines for line in file[1:]]
    assert len(rows) == BLOCKS * EPOCHS


def test_early_stopping_goes_on(calibrate: Callable[..., RunFolder]) -> None:
    settings = {"weights": WeightSpec(bits=2), "clipping": ClippingSpec(lr=0.5)}  # the loss soon rises

    def stopping() -> EarlyStopping:
        return EarlyStopping("loss", patience=1, check_on_train_epoch_end=True)

    whole = calibrate("whole", settings, [stopping()], max_epochs=8)
    assert min(entry["epochs"] for entry in results_of(whole)[:-1]) < 8
    for moment in (17, 31):
        with pytest.raises(PowerCutError):
            calibrate("cut", settings, [stopping(), PowerCut(moment)], max_epochs=8)
        assert blocks_of(calibrate("cut", settings, [stopping()], ckpt_path="last", max_epochs=8)) == blocks_of(whole)
