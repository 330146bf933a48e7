"""What a person sees: lines where there is no terminal, bars where there is one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from omniquant_pl.callbacks import MetricsCallback, ProgressCallback
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ObjectiveSpec
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
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    blocks = [line for line in lines if line.startswith("block ")]
    for index, (line, known) in enumerate(zip(blocks, metrics["blocks"], strict=True)):
        found = re.fullmatch(rf"block {index + 1}/2 · error (\S+) \(RTN (\S+)\) · \d+ s · \d+ s left", line)
        assert found is not None
        assert float(found[1]) == pytest.approx(known["relative_error"], rel=0.06)
        assert float(found[2]) == pytest.approx(known["relative_error_rtn"], rel=0.06)
    for variant in ("full precision", "round to nearest", "calibrated"):
        assert re.search(rf"^perplexity, {variant}: evaluation \d+\.\d\d · \d+ s$", out, re.MULTILINE)
    finish, size, perplexity, following = lines[-4:]
    assert re.fullmatch(r"finished: llama\d+ to w4a16 · \d+ s", finish)
    assert size.endswith(" packed")
    values = (metrics["perplexity"]["evaluation"][name] for name in ("full_precision", "round_to_nearest", "quantized"))
    assert perplexity == "perplexity, evaluation: full precision {:.2f} · RTN {:.2f} · calibrated {:.2f}".format(
        *values
    )
    assert following.endswith(f" export --config {tmp_path / 'run' / 'config.yaml'} --format packed")


def test_the_divergence_is_what_the_last_block_learns_from(
    llama: Path, fit: Callable[..., SequentialTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(
        OmniQuantModel(str(llama), objective=ObjectiveSpec(output_loss="kl")),
        [ProgressCallback(), MetricsCallback()],
        max_epochs=3,
    )
    first, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("block "))
    assert "divergence" not in first
    before, after = re.findall(r"divergence (\S+) → (\S+) · error", last)[0]
    assert 0 < float(after) <= float(before)


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
    assert all(len(line) <= 120 for line in re.split(r"[\r\n]+", plain) if "━" in line)
