"""``compare`` from its command line, each method in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from omniquant_pl.cli.program import run
from omniquant_pl.compare import fit_method
from omniquant_pl.compare.process import Finished


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compare(llama: Path, token_files: tuple[Path, Path], methods: str, *more: str) -> dict[str, dict[str, object]]:
    calibration, evaluation = token_files
    data = [f"--data.dataset={calibration}", "--data.samples=6", f"--data.evaluation=[{evaluation}]"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.default_root_dir=run"]
    run(["compare", "--config=w3a16.yaml", f"--model.path={llama}", *data, *trainer, f"--methods={methods}", *more])
    rows = json.loads(Path("run/compare.json").read_text())["rows"]
    return {row["method"]: row for row in rows}


@pytest.mark.slow
def test_rows_are_what_the_methods_are(
    llama: Path, token_files: tuple[Path, Path], tokens: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare(llama, token_files, "[rtn, best, awq]", "--model.activations.bits=8")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    with torch.no_grad():
        likelihoods = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    expected = float((-likelihoods.mean()).exp())
    assert rows["full_precision"]["perplexity"] == {"evaluation": pytest.approx(expected, rel=1e-5)}
    assert rows["full_precision"]["bits_per_weight"] == 32
    metrics = json.loads(Path("run/compare/rtn/metrics.json").read_text())
    assert rows["rtn"]["perplexity"] == {"evaluation": metrics["perplexity"]["evaluation"]["round_to_nearest"]}
    assert rows["best"]["note"] == "there is no preset configs/best/w3a8.yaml"
    assert rows["awq"]["note"] == "it is made for weights alone"
    assert all(rows[name]["peak_memory_bytes"]["host"] > 1e8 for name in ("full_precision", "rtn"))
    before = Path("run/compare/rtn/metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    assert compare(llama, token_files, "[rtn, best, awq]", "--model.activations.bits=8") == rows
    assert Path("run/compare/rtn/metrics.json").stat().st_mtime_ns == before
    assert "RTN: measured before" in capsys.readouterr().out


def test_a_method_is_a_fit_of_its_own(
    llama: Path, token_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which is quicker: what learns is the paper's settings, whatever the configuration says."""

    def run_here(command: list[str], log: Path) -> Finished:
        run(command[3:])
        return Finished(1.0, 1, None)

    monkeypatch.setattr(fit_method, "run_logged", run_here)
    measured_here = {"perplexity": {"evaluation": 1.0}}
    monkeypatch.setattr("omniquant_pl.compare.measured.measure_apart", lambda *_: measured_here)
    rows = compare(llama, token_files, "[paper]", "--model.rounding.method=gptq", "--trainer.max_epochs=1")
    metrics = json.loads(Path("run/compare/paper/metrics.json").read_text())
    assert [block["epochs"] for block in metrics["blocks"]] == [20, 20]
    assert rows["paper"]["perplexity"] == {"evaluation": metrics["perplexity"]["evaluation"]["quantized"]}
    assert rows["paper"]["size_bytes"] == metrics["size_bytes"]["quantized"]
    assert not Path("run/compare/paper/model").exists()


def test_an_unknown_method_is_refused(
    llama: Path, token_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare(llama, token_files, "[magic]")
    assert caught.value.code == 2
    assert "magic" in capsys.readouterr().err
    assert not Path("run").exists()
