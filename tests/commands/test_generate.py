"""``generate``: text on the terminal, from the run's packed folder or from the run itself."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from omniquant_pl.cli.program import main, run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export.packed import PackedExport

WORDS = [f"word{index}" for index in range(64)]


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path]) -> Path:
    """A model with a tokenizer, of which every word is a token."""
    folder = make_llama(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(source: Path, token_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its model folder."""
    calibration, evaluation = token_files
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {
        "model.path": source,
        "model.weights.bits": 4,
        "model.weights.group_size": 16,
        "data.dataset": calibration,
        "data.samples": 6,
        "data.evaluation": f"[{evaluation}]",
        "trainer.max_epochs": 0,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder,
        "progress.quiet": "true",
    }
    run(["fit", *(f"--{key}={value}" for key, value in options.items())])
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in an empty working folder, with files as old as they are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), "run"))
    return Path("run")


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``generate`` and returns what it wrote before the table."""

    def text(*arguments: str, prompt: str = "word5 word6", tokens: int = 10) -> str:
        capsys.readouterr()
        run(["generate", *arguments, f"--prompt={prompt}", f"--max_new_tokens={tokens}"])
        out = capsys.readouterr().out
        assert "tokens per second" in out
        assert re.search(r"weights [\d.]+ kB; peak memory: host [\d.]+ [MG]B", out)
        assert re.search(rf"generated[^\d]+{tokens}[^\d]", out)
        return out.partition("\n")[0]

    return text


RUN = ("--config", "run/config.yaml")


def test_goes_on_as_transformers_does(folder: Path, text: Callable[..., str]) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    expected = network.generate(torch.tensor([[5, 6]]), max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert text(*RUN) == " ".join(WORDS[token] for token in expected[0])


def test_packed_folder_of_the_run(
    folder: Path, text: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_memory = text(*RUN)
    run(["export", *RUN, "--format=packed"])
    assert (folder / "packed" / "config.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(PackedExport, "in_memory", lambda *_: pytest.fail("the folder is not used"))
        assert text(*RUN) == in_memory
    # One that is older than the run is what another run has left.
    os.utime(folder / "packed" / "config.json", (0, 0))
    shutil.rmtree(folder / "packed" / "tokenizer.json", ignore_errors=True)
    (folder / "packed" / "model.safetensors").write_bytes(b"of another run")
    assert text(*RUN) == in_memory


def test_packed_folder_that_is_given(folder: Path, text: Callable[..., str]) -> None:
    run(["export", *RUN, "--format=packed", "--output=elsewhere/packed"])
    expected = text(*RUN)
    shutil.rmtree(folder)
    assert text("--packed=elsewhere/packed", "--trainer.accelerator=cpu") == expected


def test_draws(folder: Path, text: Callable[..., str]) -> None:
    draws = [text(*RUN, "--temperature=2", f"--seed={seed}", *more) for seed, *more in ((1,), (1,), (2,))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert text(*RUN, "--temperature=2", "--top_k=1") == text(*RUN)


def test_half_precision(folder: Path, text: Callable[..., str]) -> None:
    assert text(*RUN, "--dtype=bfloat16", "--device=cpu", tokens=2).startswith("word5 word6 word")


@pytest.mark.parametrize("prompt", ["1e3", "[word1, word2]", "word1: word2"])
def test_prompt_is_taken_as_it_is(
    folder: Path, text: Callable[..., str], monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    seen: list[str] = []
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, *a, **k: (seen.append(a[0]), call(self, *a, **k))[1]
    )
    text(*RUN, prompt=prompt, tokens=1)
    assert seen == [prompt]


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((), "prompt: give the text to go on from"),
            (("--prompt=word1", "--temperature=-1"), "temperature: -1.0 is not a number of at least 0"),
            (("--prompt=word1", "--chat=true"), "chat: the tokenizer has no chat template"),
            (("--prompt=word1", "--device=abacus"), "device: abacus is not a device of this machine"),
            (("--prompt=word1", "--packed=nowhere"), "packed: there is no packed model in nowhere"),
            (("--prompt=word1", "--model.weights.bits=3"), "run holds a run with another model.weights"),
        ],
    )
    def test_setting(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        expected: str,
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", "generate", *RUN, *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert expected in err
        assert "Traceback" not in err

    def test_model_without_a_tokenizer(self, folder: Path, llama: Path) -> None:
        Path("other/blocks").mkdir(parents=True)
        arguments = ["generate", *RUN, "--prompt=word1", f"--model.path={llama}", "--trainer.default_root_dir=other"]
        with pytest.raises(ConfigurationError, match=r"model\.path: .* has no tokenizer"):
            run(arguments)

    def test_tokenizer_that_does_not_open(self, folder: Path, source: Path, tmp_path: Path) -> None:
        broken = Path(shutil.copytree(source, tmp_path / "broken"))
        (broken / "tokenizer.json").write_text("{")
        Path("other/blocks").mkdir(parents=True)
        arguments = ["generate", *RUN, "--prompt=word1", f"--model.path={broken}", "--trainer.default_root_dir=other"]
        with pytest.raises(ConfigurationError, match=r"model\.path: .* cannot be opened: tokenizer\.json is not JSON"):
            run(arguments)

    def test_packed_folder_whose_tokenizer_does_not_open(self, folder: Path) -> None:
        run(["export", *RUN, "--format=packed", "--output=packed"])
        (Path("packed") / "tokenizer.json").write_text("{")
        with pytest.raises(ConfigurationError, match=r"packed: .* cannot be opened: tokenizer\.json is not JSON"):
            run(["generate", "--packed=packed", "--prompt=word1"])

    def test_packed_folder_without_a_tokenizer(self, folder: Path) -> None:
        run(["export", *RUN, "--format=packed", "--output=packed"])
        for file in Path("packed").glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ConfigurationError, match="packed: packed has no tokenizer"):
            run(["generate", "--packed=packed", "--prompt=word1"])

    def test_unfinished_run(self, folder: Path) -> None:
        (folder / "blocks" / "00001.safetensors").unlink()
        with pytest.raises(ConfigurationError, match=r"trainer\.default_root_dir: .*00001\.safetensors is missing"):
            run(["generate", *RUN, "--prompt=word1"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["generate", "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("prompt", "chat", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "packed", "device"):
        assert f"--{option} " in shown
