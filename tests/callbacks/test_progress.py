"""What a person sees: lines where there is no terminal, bars where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from omniquant_pl.callbacks import MetricsCallback, ProgressCallback
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer


@pytest.fixture
def seen(
    llama: Path,
    fit: Callable[..., SequentialTrainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Returns what a run with this callback writes to the standard output."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def seen(quiet: bool = False, terminal: bool = False) -> str:
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        model = OmniQuantModel(str(llama))
        fit(model, [ProgressCallback(quiet), MetricsCallback()], max_epochs=3)
        return capsys.readouterr().out

    return seen


def test_lines_where_there_is_no_terminal(seen: Callable[..., str], tmp_path: Path) -> None:
    out = seen()
    assert "\x1b" not in out
    assert "\r" not in out
    first, *lines = out.splitlines()
    assert "2 blocks to w4a16" in first
    assert str(tmp_path / "run") in first
    blocks = [line for line in lines if line.startswith("block ")]
    assert [line.split(":")[0] for line in blocks] == ["block 0", "block 1"]
    for line in blocks:
        numbers = re.findall(r"\d\.\d\de[+-]\d\d", line)
        assert len(numbers) == 4  # error, that of round-to-nearest, loss before and after
        assert "3 epochs" in line
    assert re.search(r"; 1 to go, about [\d.]+ s$", blocks[0])
    assert "to go" not in blocks[1]
    assert all(re.search(r", \d+ MB|, [\d.]+ GB", line) for line in blocks)
    for variant in ("full precision", "round to nearest", "quantized"):
        assert re.search(rf"^perplexity, {variant}: evaluation \d+\.\d\d; [\d.]+ s$", out, re.MULTILINE)
    assert re.search(r"evaluation\D+[\d.]+\D+[\d.]+\D+[\d.]+", out)
    assert re.fullmatch(rf"finished in [\d.]+ s: {re.escape(str(tmp_path / 'run'))}", lines[-1])


def test_quiet_writes_nothing(seen: Callable[..., str]) -> None:
    assert seen(quiet=True) == ""
    assert seen(quiet=True, terminal=True) == ""


def test_bars_on_a_terminal(seen: Callable[..., str]) -> None:
    out = seen(terminal=True)
    assert "\x1b[" in out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert re.search(r"blocks .* 2/2", plain)
    assert re.search(r"steps .* 18/18", plain)  # three epochs of six
    assert re.search(r"block 1, epoch 3, loss \d\.\d{3}e[+-]\d\d", plain)
