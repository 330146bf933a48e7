"""The log in a file: lines and warnings with their time, added to what is there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from omniquant_pl.callbacks import MetricsCallback, ProgressCallback
from omniquant_pl.callbacks.log_file import LogFile
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) (.*)")


def test_a_quiet_run_writes_it(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "run.log"
    for _ in range(2):
        fit(OmniQuantModel(str(llama)), [ProgressCallback(quiet=True, log_file=str(path)), MetricsCallback()])
    assert capsys.readouterr().out == ""
    found = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(found)
    lines = [line[2] for line in found if line is not None]
    (start,) = [line for line in lines if "holds a run" in line]  # the second one moves the first
    lines.remove(start)
    half = lines[: len(lines) // 2]
    assert "2 blocks to w4a16" in half[0]
    assert [re.split(r"[:·]", line)[0].strip() for line in half[2:]] == [
        "perplexity, full precision",
        "block 1/2",
        "block 2/2",
        "perplexity, round to nearest",
        "perplexity, calibrated",
        "finished",
        "size",
        "perplexity, evaluation",
        "next",
    ]
    assert len(lines) == 2 * len(half)  # the second run stands behind the first


def test_warnings_reach_file_and_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = LogFile(tmp_path / "run.log")
    log.open()
    logging.getLogger("omniquant_pl.calibration.loop").warning("block 3: odd")
    log.close()
    log.write("too late")
    assert re.fullmatch(r".* WARNING block 3: odd\n", log.path.read_text())
    assert capsys.readouterr().err == "block 3: odd\n"
    assert logging.getLogger("omniquant_pl").handlers == []


def test_a_file_that_cannot_be_written_is_refused(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"progress\.log_file: .* cannot be written: Is a directory"):
        fit(OmniQuantModel(str(llama)), [ProgressCallback(log_file=str(tmp_path))])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("level", [logging.NOTSET, logging.ERROR])
def test_the_level_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    logger = logging.getLogger("omniquant_pl")
    monkeypatch.setattr(logger, "level", level)
    log = LogFile(tmp_path / "run.log")
    log.open()
    assert logger.level == logging.INFO
    log.close()
    log.close()
    assert logger.level == level
