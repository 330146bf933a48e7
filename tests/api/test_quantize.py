"""``quantize`` for a model in memory: the command line's result, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from omniquant_pl import quantize
from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError

Fit = Callable[[str], dict[str, torch.Tensor]]
EMBEDDED = Path(__file__).parents[2] / "omniquant_pl" / "models" / "tiny-llama"
QUICK = {"trainer.max_epochs": 2, "trainer.accelerator": "cpu"}


@pytest.fixture
def command_line(llama: Path, token_files: tuple[Path, Path], tmp_path: Path) -> Fit:
    """What a fit on the six windows of the file exports."""

    def fit(preset: str) -> dict[str, torch.Tensor]:
        data = [f"--data.dataset={token_files[0]}", "--data.samples=6", "--data.evaluation=[]"]
        trainer = [
            *(f"--{key}={value}" for key, value in QUICK.items()),
            f"--trainer.default_root_dir={tmp_path / 'cli'}",
        ]
        run(["fit", f"--config={preset}", f"--model.path={llama}", *data, *trainer, "--progress.quiet=true"])
        return load_file(tmp_path / "cli" / "model" / "model.safetensors")

    return fit


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("scheme", ["w4a4", "best/w3a16"])
def test_equals_the_command_line(llama: Path, token_files: tuple[Path, Path], command_line: Fit, scheme: str) -> None:
    model = load(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.from_numpy(np.load(token_files[0]))
    quantized = quantize(model, scheme=scheme, calibration=tokens, settings=QUICK)
    expected = command_line(f"{scheme}.yaml")
    found = quantized.state_dict()
    assert set(expected) <= set(found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(found[name], before[name]) for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (type(quantized), quantized.training) == (type(model), False)


def test_texts_and_a_run_that_stays(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    settings = {**QUICK, "trainer.max_epochs": 0, "data.samples": 2, "data.sequence_length": 16}
    texts = ["The first text of a few words. " * 20, "Another one. " * 20]
    quantized = quantize(model, tokenizer, calibration=texts, settings=settings, output=tmp_path / "run")
    assert quantized.dtype == torch.bfloat16
    run(["export", f"--config={tmp_path / 'run' / 'config.yaml'}", "--format=packed"])
    assert (tmp_path / "run" / "packed" / "tokenizer.json").is_file()
    quantized.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")


def test_random_numbers_go_on_as_if_nothing_had_happened(
    llama: Path, token_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED")
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    tokens = torch.from_numpy(np.load(token_files[0]))
    quantize(load(llama), scheme="w4a16", calibration=tokens, settings={**QUICK, "trainer.max_epochs": 0})
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert "PL_GLOBAL_SEED" not in os.environ


def test_a_run_folder_whose_export_would_replace_something_is_refused(llama: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models" / "model" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    for output in (tmp_path / "models", llama):
        with pytest.raises(ConfigurationError, match=rf"^output: {output / 'model'} "):
            quantize(load(llama), settings=QUICK, output=output)
        assert not (output / "original").exists()
    assert mine.exists()


@pytest.mark.parametrize("name", ["original", "calibration.npy"])
def test_a_folder_keeps_what_would_be_replaced(llama: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(llama, tmp_path / name)
    with pytest.raises(ConfigurationError, match=rf"^output: {tmp_path / name} is there already"):
        quantize(load(tmp_path / name), settings=QUICK, output=tmp_path)
    stored = (llama / "model.safetensors").read_bytes()
    assert (tmp_path / name / "model.safetensors").read_bytes() == stored


def test_a_folder_that_holds_a_run_keeps_its_model(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigurationError, match=rf"^output: {tmp_path} holds a run"):
        quantize(load(llama), settings=QUICK, output=tmp_path)
    assert not (tmp_path / "original").exists()
