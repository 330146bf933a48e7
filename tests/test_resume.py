"""An interrupted calibration, taken up again, ends with the files of one that was not interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from omniquant_pl.callbacks import CheckpointCallback, KeepBestState, MetricsCallback, NumericsGuard
from omniquant_pl.hooks import CalibrationCallback
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run_folder import RunFolder
from omniquant_pl.spec import ActivationSpec, ScheduleSpec, TransformSpec, WeightSpec, WindowSpec
from omniquant_pl.trainer import SequentialTrainer

Fit = Callable[..., SequentialTrainer]

EPOCHS, BATCHES, BLOCKS = 3, 3, 3


class PowerCutError(Exception):
    """The process is gone."""


class PowerCut(CalibrationCallback):
    """Ends everything at the n-th of the moments that a calibration can be interrupted at."""

    def __init__(self, moment: int) -> None:
        self._left = moment

    def _tick(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise PowerCutError

    def on_train_batch_start(self, *_: Any) -> None:
        self._tick()

    def on_train_batch_end(self, *_: Any) -> None:
        self._tick()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._tick()

    def on_block_start(self, *_: Any) -> None:
        self._tick()

    def on_block_trained(self, *_: Any) -> None:
        self._tick()

    def on_block_end(self, *_: Any) -> None:
        self._tick()

    def on_calibration_end(self, *_: Any) -> None:
        self._tick()


SETTINGS: dict[str, dict[str, Any]] = {
    "clipping": {"weights": WeightSpec(bits=3)},
    "w4a4": {"activations": ActivationSpec(bits=4), "transform": TransformSpec(mlp=True)},
    "rounding": {"rounding": "learned", "schedule": ScheduleSpec(warmup=0.2, decay="linear")},
    "gptq": {"rounding": "gptq", "aug_loss": True},
    "windows": {"window": WindowSpec(blocks=2), "rounding": "learned"},
    "wide windows": {"window": WindowSpec(blocks=3, stride=2), "weights": WeightSpec(bits=2)},
}


@pytest.fixture
def calibrate(make_llama: Callable[..., Path], fit: Fit, tmp_path: Path) -> Callable[..., RunFolder]:
    """Calibrates into a folder by name, once more if it is told to go on."""
    folder = make_llama(num_hidden_layers=BLOCKS)

    def calibrate(
        name: str,
        settings: dict[str, Any],
        callbacks: list[Callback],
        ckpt_path: str | None = None,
        steps: int | None = 2,
        **options: Any,
    ) -> RunFolder:
        checkpoint = CheckpointCallback(every_n_steps=steps, every_minutes=None)
        guards = [MetricsCallback(), NumericsGuard(), checkpoint]
        root = tmp_path / name
        fit(
            OmniQuantModel(str(folder), **settings),
            [*callbacks, *guards],
            {"batch_size": 2},
            max_epochs=EPOCHS,
            default_root_dir=root,
            ckpt_path=ckpt_path,
            **options,
        )
        return RunFolder(root)

    return calibrate


def files_of(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.blocks.iterdir())}


def results_of(run: RunFolder) -> list[dict[str, Any]]:
    """What was measured, without the time that it took."""
    metrics = json.loads(run.metrics.read_text())
    return [{**entry, "seconds": None} for entry in metrics["blocks"]] + [metrics["perplexity"]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_moments_all_over_a_calibration(calibrate: Callable[..., RunFolder], settings: str) -> None:
    """Before, inside and behind steps, epochs and blocks; each setting has moments of its own."""
    options = SETTINGS[settings]
    whole = calibrate("whole", options, [KeepBestState()])
    moments = range(3 + list(SETTINGS).index(settings), 100, 13)
    for moment in moments:
        try:
            calibrate(f"cut{moment}", options, [KeepBestState(), PowerCut(moment)])
        except PowerCutError:
            again = calibrate(f"cut{moment}", options, [KeepBestState()], ckpt_path="last")
            assert files_of(again) == files_of(whole), moment
            assert results_of(again) == results_of(whole), moment
        else:
            break
    assert moment > moments[1]  # it was interrupted at more than one
