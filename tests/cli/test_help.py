"""What --help says, and completion by a real shell."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omniquant_pl.cli.program import run


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        run(["fit", "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_reads_as_documentation(said: str) -> None:
    first, *lines = said.splitlines()
    assert first == "usage: train.py fit [--config FILE] [--SECTION.KEY VALUE ...]"
    assert lines[1].startswith("Calibrate a model block by block")
    own = ("--model.path", "--model.weights.bits", "--data.dataset", "--progress.log_file", "--report.every_seconds")
    places = [said.index(f"  {flag} ") for flag in (*own, "--trainer.max_epochs")]
    assert places == sorted(places)
    assert "last: go on with the run in the run folder" in said
    assert ":class:" not in said[: said.index("--trainer.")]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="needs shtab, of the extra 'completion'")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["omniquant"])
    with pytest.raises(SystemExit) as stopped:
        run(["--print_completion=shtab-bash"])
    assert stopped.value.code == 0
    (tmp_path / "omniquant").write_text(capsys.readouterr().out)
    ask = """source omniquant
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_omniquant; echo "${COMPREPLY[@]}"; }
ask omniquant ""; ask omniquant fit --model.weights.b; ask omniquant fit --model.rounding.method "" """
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    commands, flags, values = (line.split() for line in done.stdout.splitlines())
    assert {"fit", "test", "export", "generate"} <= set(commands)
    assert flags == ["--model.weights.bits", "--model.weights.bits_of"]
    assert values == ["nearest", "learned", "gptq"]
