"""The command line: presets by name, and one clear message for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from omniquant_pl.cli.program import main, run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.utils.presets import find_config

ROOT = Path(__file__).parents[2]
Arguments = list[str]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def tiny(llama: Path, token_files: tuple[Path, Path]) -> Callable[..., Arguments]:
    """The arguments of a fit that takes no time, with further ones behind."""
    calibration, evaluation = token_files

    def tiny(*more: str) -> Arguments:
        options = {
            "model.path": llama,
            "data.dataset": calibration,
            "data.samples": 6,
            "data.evaluation": f"[{evaluation}]",
            "trainer.max_epochs": 0,
            "trainer.accelerator": "cpu",
            "trainer.default_root_dir": "run",
            "progress.quiet": "true",
        }
        return ["fit", "--config", "w4a4.yaml", *(f"--{k}={v}" for k, v in options.items()), *more]

    return tiny


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Arguments], str]:
    """Runs the program, which has to refuse, and returns its message as a person sees it."""

    def refusal(arguments: Arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert out == ""
        lines = [line for line in err.splitlines() if not line.startswith(("see: ", "Seed set"))]
        assert lines[0].startswith("error: "), err
        assert len(lines) <= 3, err
        assert "Traceback" not in err
        assert not Path("run").exists()
        return "\n".join(lines)

    return refusal


class TestConfigByName:
    @pytest.mark.parametrize(
        "spelling",
        [
            ("--config", "w3a16.yaml"),
            ("--config=w3a16.yaml",),
            ("-c", "w3a16.yaml"),
            ("-c=w3a16.yaml",),
        ],
        ids=" ".join,
    )
    def test_all_spellings(self, spelling: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            run(["fit", *spelling, "--print_config"])
        assert caught.value.code == 0
        assert "default_root_dir: runs/w3a16" in capsys.readouterr().out

    def test_preset(self) -> None:
        assert Path(find_config("w4a4.yaml")).samefile(ROOT / "configs" / "w4a4.yaml")

    def test_preset_in_a_folder(self) -> None:
        assert Path(find_config("best/w4a4.yaml")).samefile(ROOT / "configs" / "best" / "w4a4.yaml")

    def test_own_file_comes_first(self) -> None:
        Path("w4a4.yaml").write_text("seed_everything: 5\n")
        assert find_config("w4a4.yaml") == "w4a4.yaml"

    @pytest.mark.parametrize("name", ["./w4a4.yaml", "elsewhere/w4a4.yaml", "best/w9a9.yaml", ""])
    def test_what_is_not_there_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^--config: "):
            find_config(name)

    def test_an_unknown_bare_name_lists_the_presets(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^--config: .* nope\.yaml, .*; presets: .*w4a4, "):
            find_config("nope.yaml")

    def test_later_arguments_win(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("own.yaml").write_text("model: {weights: {group_size: 32}}\n")
        arguments = ["--config", "w3a16.yaml", "--config", "own.yaml", "--model.weights.bits", "5"]
        with pytest.raises(SystemExit):
            run(["fit", *arguments, "--print_config"])
        out = capsys.readouterr().out
        assert "bits: 5" in out
        assert "group_size: 32" in out


class TestRefused:
    @pytest.mark.parametrize(
        ("argument", "expected"),
        [
            ("--model.weights.bits=1", "model.weights.bits: 1 is not a width from 2 to 8"),
            ("--model.weights.bits=17", "model.weights.bits: 17 is not a width from 2 to 8"),
            ("--model.weights.bits=four", "model.weights.bits"),
            ("--model.weights.group_size=0", "model.weights.group_size: 0 is neither null"),
            ("--model.activations.bits=1", "model.activations.bits: 1 is not a width from 2 to 8"),
            ("--model.clipping.lr=0", "model.clipping.lr: 0.0 is not a number above 0"),
            ("--model.transform.alpha=2", "model.transform.alpha: 2.0 is not within 0 and 1"),
            ("--model.path=nowhere", "model.path: there is no folder 'nowhere'"),
            ("--model.parameters=nowhere", "model.parameters: nowhere is not the folder of"),
            ("--data.sequence_length=64", "data.sequence_length: 64 is more than the 32 positions"),
            ("--data.dataset=gone.npy", "data.dataset: there is no file 'gone.npy'"),
            ("--data.samples=100", "data.samples: 100 windows are asked for"),
            ("--trainer.max_epoch=1", "--trainer.max_epoch: "),
            ("--trainer.max_epochs=-1", "trainer.max_epochs: -1 is below 0"),
            ("--trainer.max_steps=5", "trainer.max_steps: "),
            ("--trainer.precision=16-mixed", "trainer.precision: 16-mixed would round"),
            ("--trainer.strategy=fsdp", "trainer.strategy: blocks cannot be calibrated with fsdp; accepted: auto, ddp"),
            ("--trainer.accelerator=abacus", "trainer.accelerator: abacus is not accepted"),
            ("--export.dtype=int8", "export.dtype: int8 is not accepted; expected float32, float16, bfloat16, null"),
            (
                "--model.transform.initial=foo",
                "model.transform.initial: foo is not accepted; expected smoothquant, search",
            ),
            ("--model.transform.alpha=x", "model.transform.alpha: x is not accepted; expected a number"),
            ("--model.objective.window=null", "model.objective.window: null is not accepted; expected its settings"),
            ("--checkpoint.every_n_steps=0", "checkpoint.every_n_steps: 0"),
            ("--checkpoint.every_minutes=0", "checkpoint.every_minutes: 0"),
            ("--model.activation_budget.host=-1", "model.activation_budget.host: -1"),
        ],
    )
    def test_setting(
        self,
        tiny: Callable[..., Arguments],
        refusal: Callable[[Arguments], str],
        argument: str,
        expected: str,
    ) -> None:
        assert expected in refusal(tiny(argument))

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("model: {wieghts: {bits: 4}}", "model.wieghts"),
            ("model: {weights: {bit: 4}}", "model.weights.bit"),
            ("modle: {path: a}", "own.yaml, line 1: there is no setting modle.path"),
            ("model: {weights: {bits: 1}}", "model.weights.bits: 1"),
            ("model: {activations: {bits: 16}}", "model.activations.bits: 16"),
            ("model: {clipping: {lr: -1.0}}", "model.clipping.lr: -1.0"),
            ("data: {batch_size: 0}", "data.batch_size: 0"),
            ("data: {micro_batch_size: 0}", "data.micro_batch_size: 0"),
            ("data: {batch_size: 2, micro_batch_size: 3}", "data.micro_batch_size: 3"),
            ("model: [", "own.yaml, line 1, column 9: "),
            ("- a", "own.yaml, line 1, column 1: the file holds a list"),
        ],
    )
    def test_key_of_a_file(
        self,
        tiny: Callable[..., Arguments],
        refusal: Callable[[Arguments], str],
        content: str,
        expected: str,
    ) -> None:
        Path("own.yaml").write_text(content)
        assert expected in refusal(tiny("--config=own.yaml"))

    def test_config_that_is_not_there(self, refusal: Callable[[Arguments], str]) -> None:
        assert "nope.yaml" in refusal(["fit", "--config", "nope.yaml"])

    def test_config_that_is_a_folder(self, refusal: Callable[[Arguments], str]) -> None:
        Path("folder.yaml").mkdir()
        assert "folder.yaml" in refusal(["fit", "--config", "folder.yaml"])

    def test_config_that_is_no_text(self, refusal: Callable[[Arguments], str]) -> None:
        Path("model.yaml").write_bytes(b"\xff\xfe\x00\x01")
        assert "not UTF-8 text" in refusal(["fit", "--config", "model.yaml"])

    def test_model_without_safetensors(
        self, llama: Path, tiny: Callable[..., Arguments], refusal: Callable[[Arguments], str]
    ) -> None:
        shutil.copytree(llama, "pickled")
        Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
        message = refusal(tiny("--model.path=pickled"))
        assert "model.path: pickled holds neither model.safetensors nor" in message

    def test_weight_that_is_not_finite(
        self, llama: Path, tiny: Callable[..., Arguments], refusal: Callable[[Arguments], str]
    ) -> None:
        shutil.copytree(llama, "broken")
        tensors = load_file("broken/model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][3, 4] = float("nan")
        save_file(tensors, "broken/model.safetensors", {"format": "pt"})
        message = refusal(tiny("--model.path=broken"))
        assert message == f"error: model.path: broken: 1 values of {name} are NaN or infinite"

    def test_family_that_nobody_registered(
        self, tiny: Callable[..., Arguments], refusal: Callable[[Arguments], str]
    ) -> None:
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
        GPT2LMHeadModel(config).save_pretrained("gpt2")
        message = refusal(tiny("--model.path=gpt2"))
        assert "model.path: gpt2/config.json: the family 'gpt2' is not supported; known: " in message

    def test_test_of_an_unfinished_run(
        self, tiny: Callable[..., Arguments], refusal: Callable[[Arguments], str]
    ) -> None:
        message = refusal(["test", *tiny()[1:]])
        assert "trainer.default_root_dir: there is no run in run; calibrate it first: train.py fit" in message

    def test_run_folder_of_other_settings(
        self, tiny: Callable[..., Arguments], refusal: Callable[[Arguments], str]
    ) -> None:
        run(tiny())
        Path("run").rename("done")
        arguments = tiny("--trainer.default_root_dir=done", "--model.weights.bits=3")
        assert "trainer.default_root_dir: done holds a run with another model." in refusal(arguments)

    @pytest.mark.parametrize("arguments", [[], ["--config", "w4a4.yaml"], ["banana"]])
    def test_no_command(self, refusal: Callable[[Arguments], str], arguments: Arguments) -> None:
        message = refusal(arguments)
        assert "fit" in message
        assert "test" in message


def test_group_size_that_does_not_divide_works(tiny: Callable[..., Arguments]) -> None:
    run(tiny("--model.weights.group_size=5"))
    factors = load_file("run/blocks/00000.safetensors")
    assert factors["self_attn.q_proj.clip.upper"].shape == (32, 7)  # 32 = 6 * 5 + 2


def test_program_ends_with_a_message_and_a_code(tiny: Callable[..., Arguments]) -> None:
    """As a process of its own: what the shell of a person gets."""
    arguments = tiny("--model.activations.bits=1")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: model.activations.bits: 1 is not")


class TestOtherSettings:
    """What a run left is neither overwritten nor measured under settings that are not its own."""

    @pytest.mark.parametrize("command", ["fit", "test"])
    @pytest.mark.parametrize("change", ["--model.weights.bits=2", "--model.activations=null"])
    def test_are_refused(
        self, tiny: Callable[..., Arguments], capsys: pytest.CaptureFixture[str], command: str, change: str
    ) -> None:
        run(tiny())
        before = Path("run/metrics.json").read_bytes()
        with pytest.raises(ConfigurationError, match=r"run holds a run with another model\."):
            run([command, *tiny(change)[1:]])
        assert Path("run/metrics.json").read_bytes() == before

    def test_the_same_settings_are_measured_again(self, tiny: Callable[..., Arguments]) -> None:
        run(tiny())
        before = json.loads(Path("run/metrics.json").read_text())
        run(["test", *tiny()[1:]])
        assert json.loads(Path("run/metrics.json").read_text()) == before


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_keeps_what_is_finished(
    tiny: Callable[..., Arguments],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
) -> None:
    written = []

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if written:
            Path(path).write_bytes(b"the part that still had room")
            raise failure
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr("omniquant_pl.utils.files.save_file", save)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert re.fullmatch(r"error: .*No space left on device\n", capsys.readouterr().err)
    assert [path.name for path in Path("run/blocks").iterdir()] == ["00000.safetensors"]
    assert load_file("run/blocks/00000.safetensors")


def test_gradients_are_clipped_under_mixed_precision(tiny: Callable[..., Arguments]) -> None:
    run(tiny("--trainer.max_epochs=1", "--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=1"))
    assert json.loads(Path("run/metrics.json").read_text())["blocks"][0]["epochs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_on_the_device_agrees_with_the_host(tiny: Callable[..., Arguments], precision: str) -> None:
    perplexities = []
    for accelerator in ("cpu", "gpu"):
        options = (f"--trainer.accelerator={accelerator}", "--trainer.max_epochs=2", f"--trainer.precision={precision}")
        run(tiny(*options, f"--trainer.default_root_dir={accelerator}"))
        perplexities.append(json.loads(Path(accelerator, "metrics.json").read_text())["perplexity"]["evaluation"])
    host, device = perplexities
    for variant, value in host.items():
        assert device[variant] == pytest.approx(value, rel=0.05 if "bf16" in precision else 0.01)


def test_help_explains_the_keys_inside_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["fit", "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.weights.bits BITS Code width, 2 to 8." in shown
    assert "--model.objective.window.blocks BLOCKS Blocks of a window." in shown
