"""``quantize`` for a model in memory: the command line's result, bit for bit."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from omniquant_pl import quantize
from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError

Fit = Callable[[str], dict[str, torch.Tensor]]
EMBEDDED = Path(__file__).parents[1] / "omniquant_pl" / "models" / "tiny-llama"
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


@pytest.mark.parametrize("seed", [None, "7"])
def test_the_seed_is_what_it_was_after_a_fit_that_fails(
    llama: Path, monkeypatch: pytest.MonkeyPatch, seed: str | None
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED")
    if seed is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    with pytest.raises(ConfigurationError, match="it is text, which needs the model's tokenizer"):
        quantize(load(llama), calibration=["a text"], settings=QUICK)
    assert os.environ.get("PL_GLOBAL_SEED") == seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "w9a9"}, r"--config: there is no file w9a9\.yaml, and no preset of that name"),
        (
            {"calibration": torch.zeros(4, 2, 2, dtype=torch.long)},
            r"^calibration: it has shape \[4, 2, 2\], where token ids are \[tokens\]",
        ),
        ({"calibration": "gone.npy"}, "data.dataset: there is no file 'gone.npy'"),
        ({"calibration": ["a text"]}, "^calibration: it is text, which needs the model's tokenizer"),
    ],
)
def test_refused(llama: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantize(load(llama), settings=QUICK, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.weights.bits": 17}, r"^model\.weights\.bits: 17 is not a width"),
        ({"model.weights.bits": "four"}, r"model\.weights\.bits: .*four"),
        ({"model.weigths.bits": 3}, "model.weigths.bits"),
        ({"trainer.precision": "16-mixed"}, r"^trainer\.precision: 16-mixed would round"),
        ({"trainer.devices": 0}, r"^trainer"),
    ],
)
def test_settings_are_refused_before_the_model_is_saved(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str
) -> None:
    model = load(llama)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_, **__: pytest.fail("it was saved"))
    with pytest.raises(ConfigurationError, match=message):
        quantize(model, settings=settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [{"temperature": 0.6, "top_p": 0.9}, {"num_beams": 1, "length_penalty": 2.0}], ids=str
)
def test_generation_settings_come_back_as_they_were(
    llama: Path, token_files: tuple[Path, Path], flags: dict[str, float]
) -> None:
    """transformers loads them with a warning, and refuses to write them."""
    model = load(llama)
    model.generation_config = GenerationConfig(do_sample=False, **flags)
    given = model.generation_config
    quantized = quantize(
        model, scheme="w4a16", calibration=np.load(token_files[0]), settings={**QUICK, "trainer.max_epochs": 0}
    )
    assert model.generation_config is given
    assert {name: getattr(quantized.generation_config, name) for name in flags} == flags


class TestTheModel:
    def test_of_another_library(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^model: Linear is no model of transformers"):
            quantize(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

    def test_quantized_already(self, llama: Path) -> None:
        model = load(llama)
        model.is_quantized = True
        with pytest.raises(ConfigurationError, match=r"^model: it is quantized already"):
            quantize(model)

    def test_offloaded(self, llama: Path) -> None:
        model = load(llama)
        model.lm_head.to("meta")
        with pytest.raises(ConfigurationError, match=r"^model: some weights are offloaded"):
            quantize(model)


def test_the_process_is_left_as_it_was(llama: Path) -> None:
    def state() -> tuple[object, ...]:
        levels = [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric", "omniquant_pl")]
        handlers = [list(logging.getLogger(name).handlers) for name in (None, "omniquant_pl")]
        switches = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
        return levels, handlers, list(warnings.filters), switches, signal.getsignal(signal.SIGTERM), Path.cwd()

    before = state()
    tokens = torch.zeros(2, 8, dtype=torch.long)
    quantize(load(llama), calibration=tokens, settings={**QUICK, "trainer.max_epochs": 0})
    assert state() == before
    with pytest.raises(ConfigurationError):
        quantize(load(llama), calibration=[None], settings=QUICK)
    assert state() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud83d", r"row 1 has half a surrogate pair, U\+D83D, as character 2"),
        ("a\0b", "row 1 holds NUL"),
        (None, "row 1 is None; give a text"),
    ],
)
def test_texts_that_are_none(llama: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^calibration: {message}"):
        quantize(load(llama), calibration=["fine", text], settings=QUICK)


def test_a_run_folder_whose_export_would_replace_something_is_refused(llama: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models" / "model" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    for output in (tmp_path / "models", llama):
        with pytest.raises(ConfigurationError, match=rf"^output: {output / 'model'} "):
            quantize(load(llama), settings=QUICK, output=output)
        assert not (output / "original").exists()
    assert mine.exists()


def test_a_folder_that_holds_a_run_keeps_its_model(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigurationError, match=rf"^output: {tmp_path} holds a run"):
        quantize(load(llama), settings=QUICK, output=tmp_path)
    assert not (tmp_path / "original").exists()


class TestTiedWeights:
    """Embedding and head of the result are those of the model that was given, whatever its configuration says."""

    @pytest.fixture
    def folder(self, make_llama: Callable[..., Path]) -> Path:
        return make_llama(tie_word_embeddings=True, vocab_size=60)

    @staticmethod
    def own_head() -> torch.Tensor:
        return torch.randn(60, 32, generator=torch.Generator().manual_seed(5))

    def check(self, model: PreTrainedModel, token_files: tuple[Path, Path]) -> PreTrainedModel:
        tokens = torch.from_numpy(np.load(token_files[0])) % 60
        settings = {**QUICK, "trainer.max_epochs": 0}
        quantized = quantize(model, scheme="w8a8", calibration=tokens, settings=settings)
        assert torch.equal(quantized.get_input_embeddings().weight, model.get_input_embeddings().weight)
        assert torch.equal(quantized.get_output_embeddings().weight, model.get_output_embeddings().weight)
        return quantized

    def test_a_stored_head_that_differs(self, folder: Path, token_files: tuple[Path, Path]) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"lm_head.weight": self.own_head()}, folder / "model.safetensors", {"format": "pt"})
        model = load(folder)
        assert torch.equal(model.lm_head.weight, self.own_head())
        assert not self.check(model, token_files).config.tie_word_embeddings

    def test_a_head_that_was_given_to_the_model(self, folder: Path, token_files: tuple[Path, Path]) -> None:
        model = load(folder)
        model.lm_head.weight = torch.nn.Parameter(self.own_head())
        self.check(model, token_files)

    def test_a_head_that_is_stored_alone(self, folder: Path, token_files: tuple[Path, Path]) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        quantized = self.check(load(folder), token_files)
        assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
