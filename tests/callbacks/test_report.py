"""When the report is written, and that it costs no calibration."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback
from omniquant_pl.callbacks import MetricsCallback, ReportCallback
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ObjectiveSpec, WindowSpec
from omniquant_pl.trainer import SequentialTrainer

pytestmark = pytest.mark.report


class HeartbeatMonitor(CalibrationCallback):
    """Looks at the report after every block, and ends the run after one of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.states: list[str | None] = []
        self._stop_after = stop_after

    def on_block_end(self, trainer: SequentialTrainer, block: QuantizedBlock, result: BlockResult) -> None:
        report = trainer.run_folder.report
        found = re.search(r"(\d of \d) blocks done", report.read_text()) if report.is_file() else None
        self.states.append(found and found[1])
        if block.index == self._stop_after:
            raise KeyError("taken away")


@pytest.fixture
def calibrate(llama: Path, fit: Callable[..., SequentialTrainer]) -> Callable[..., SequentialTrainer]:
    def calibrate(*callbacks: Any, model: dict[str, Any] | None = None, **options: Any) -> SequentialTrainer:
        # In front of the metrics, as on the command line: ends are heard in reverse.
        return fit(OmniQuantModel(str(llama), **(model or {})), [*callbacks, MetricsCallback()], **options)

    return calibrate


def test_it_is_written_after_every_block(calibrate: Callable[..., SequentialTrainer]) -> None:
    watch = HeartbeatMonitor()
    trainer = calibrate(watch, ReportCallback(every_seconds=0))
    first, second = watch.states
    assert first == "1 of 2"
    assert second in ("1 of 2", "2 of 2")  # it waits where writing has taken a share of the time
    assert "blocks done" not in trainer.run_folder.report.read_text()


def test_it_is_written_at_most_so_often(calibrate: Callable[..., SequentialTrainer]) -> None:
    watch = HeartbeatMonitor()
    trainer = calibrate(watch, ReportCallback(every_seconds=1000))
    assert watch.states == [None, None]
    assert "finished" in trainer.run_folder.report.read_text()


def test_a_run_that_goes_on_reports_every_block(calibrate: Callable[..., SequentialTrainer]) -> None:
    with pytest.raises(KeyError, match="taken away"):
        calibrate(HeartbeatMonitor(stop_after=0), ReportCallback())
    trainer = calibrate(ReportCallback(), ckpt_path="last")
    page = trainer.run_folder.report.read_text()
    assert [path.name for path in sorted(trainer.run_folder.statistics.iterdir())] == ["00000.json", "00001.json"]
    assert "from violet, block 0, to yellow, block 1" in page
    assert page.count('data-key="blocks.') == 12


def test_windows_keep_the_losses_of_the_block_they_begin_with(calibrate: Callable[..., SequentialTrainer]) -> None:
    trainer = calibrate(ReportCallback(), model={"objective": ObjectiveSpec(window=WindowSpec(2, 2))})
    losses = [path.read_text() for path in sorted(trainer.run_folder.statistics.iterdir())]
    assert '"epoch_losses": []' not in losses[0]
    assert '"epoch_losses": []' in losses[1]


def test_it_can_be_turned_off(calibrate: Callable[..., SequentialTrainer]) -> None:
    trainer = calibrate(ReportCallback(enabled=False))
    assert not trainer.run_folder.report.exists()
    assert not trainer.run_folder.statistics.exists()


def test_nothing_learned(calibrate: Callable[..., SequentialTrainer]) -> None:
    trainer = calibrate(ReportCallback(), model={"clipping": None}, max_epochs=0)
    page = trainer.run_folder.report.read_text()
    assert "<h2>Learning</h2>" not in page
    assert "<h2>Clipping</h2>" not in page
    assert "model.transform is null" in page


def test_a_report_that_fails_costs_no_calibration(
    calibrate: Callable[..., SequentialTrainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr("omniquant_pl.callbacks.report.write_report", write)
    with caplog.at_level(logging.WARNING):
        trainer = calibrate(ReportCallback())
    assert "quantized" in trainer.run_folder.read_metrics()["perplexity"]["evaluation"]
    assert "report.html could not be written: ModuleNotFoundError: No module named 'matplotlib'" in caplog.text


def test_negative_seconds_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"report\.every_seconds: -1"):
        ReportCallback(every_seconds=-1)
