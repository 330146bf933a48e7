"""What strangers type wrongly, and the one line that they get for it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from omniquant_pl.cli.messages.foreign import KEYS
from omniquant_pl.cli.program import main, run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.trainer.devices import check_devices

ROOT = Path(__file__).parents[2]

FILES = {
    "misspelt.yaml": "# of a colleague\nmodel:\n  weigths:\n    bits: 4\n",
    "deep.yaml": "model:\n  path: llama\n  activations:\n    bit: 4\n",
    "top.yaml": "seed_everything: 1\nmodle: {path: a}\n",
    "word.yaml": "model:\n  weights:\n    bits: four\n",
    "bracket.yaml": "model: [\n",
    "tab.yaml": "model:\n\tpath: a\n",
    "indented.yaml": "model:\n  weights:\n    bits: 4\n   group_size: 128\n",
    "twice.yaml": "model:\n  path: a\ndata: {samples: 4}\nmodel:\n  path: b\n",
    "twice-inside.yaml": "model:\n  weights:\n    bits: 4\n    bits: 3\n",
    "colon.yaml": "model:\n  path:tiny-llama\n",
    "one-colon-more.yaml": "model:\n  path: a: b\n",
    "empty.yaml": "",
    "comments.yaml": "# nothing yet\n",
    "list.yaml": "- model\n- data\n",
    "text.yaml": "hello\n",
    "section.yaml": "model:\n",
    "braces.yaml": "{}\n",
    "number.yaml": "model: 3\n",
    "quoted.yaml": 'model: "@org/llama"\n',
    "quoted-colons.yaml": 'data: "a: b: c"\n',
    "merge.yaml": "<<: {model: {path: a}}\n",
    "number-inside.yaml": "model:\n  weights: 4\n",
    "null.yaml": "data:\n  samples: null\n",
    "null-section.yaml": "model:\ndata: {samples: 4}\n",
    "no-list.yaml": "data:\n  evaluation: wikitext2\n",
    "callback.yaml": "trainer:\n  callbacks:\n    - class_path: EarlyStoping\n",
    "argument.yaml": (
        "trainer:\n  callbacks:\n    - class_path: EarlyStopping\n      init_args:\n"
        "        monitor: loss\n        patiense: 3\n"
    ),
    "strategy.yaml": (
        "trainer:\n  strategy:\n    class_path: omniquant_pl.distributed.BlockParallelStrategy\n"
        "    init_args: {segmnts: 2}\n"
    ),
    "table.csv": "text\nonce upon a time\n",
    "notes": "x",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Path, token_files: tuple[Path, Path]) -> Path:
    """Where the stranger works: a model, tokens, some files, nothing calibrated."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    (folder / "latin.yaml").write_bytes("model: {path: modèle}\n".encode("latin-1"))
    (folder / "old-run").mkdir()
    (folder / "old-run" / "config.yaml").write_text("model: {path: tiny-llama}\n")
    (folder / "nothing").mkdir()
    shutil.copytree(llama, folder / "llama")
    for path, name in zip(token_files, ("calibration.npy", "evaluation.npy"), strict=True):
        shutil.copy(path, folder / name)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder


BASE = (
    "--config w4a4.yaml --model.path llama --data.dataset calibration.npy --data.samples 6 "
    "--data.evaluation=[evaluation.npy] --trainer.max_epochs 0 --trainer.accelerator cpu "
    "--trainer.default_root_dir run --progress.quiet true"
)
NO_DEVICE = r"devices of this machine: cpu\b"

# (what is typed behind the program's name, ~ standing for BASE; what the line says behind "error: ")
MISTAKES = [
    # commands
    ("", r"name a command: fit, test, .* or plan; for example: train\.py fit --config w4a16g128\.yaml --model\.path "),
    ("--config w4a4.yaml", r"name a command: .*; for example: train\.py fit --config w4a4\.yaml"),
    ("w4a4.yaml", r"name a command: .*; for example: train\.py fit --config w4a4\.yaml"),
    ("trian", r"there is no command 'trian'; did you mean: train\.py fit"),
    ("quantize --config w4a4", r"there is no command 'quantize'; did you mean: train\.py fit --config w4a4"),
    (
        "eval --config a/config.yaml",
        r"--config: there is no file a/config\.yaml, and so no run in a; fit calibrates one",
    ),
    ("genrate", r"there is no command 'genrate'; did you mean: train\.py generate"),
    ("banana", r"there is no command 'banana'; there are fit, test, export, generate, compare, plan"),
    ("fit test", r"test: one command at a time; run train\.py test on its own"),
    # keys as flags
    ("fit ~ --model.weigths.bits 3", r"--model\.weigths\.bits: .* did you mean --model\.weights\.bits\?"),
    ("fit ~ --modle.weights.bits=3", r"--modle\.weights\.bits: .* did you mean --model\.weights\.bits\?"),
    ("fit ~ --model.weights.bit=3", r"--model\.weights\.bit: .* did you mean --model\.weights\.bits\?"),
    ("fit ~ --model.activations.bit=8", r"--model\.activations\.bit: .* did you mean --model\.activations\.bits\?"),
    ("fit ~ --model.transfrom.lr=1", r"--model\.transfrom\.lr: .* did you mean --model\.transform\.lr\?"),
    ("fit ~ --data.sample 4", r"--data\.sample: .* did you mean --data\.samples\?"),
    ("fit ~ --trainer.max_epoch 4", r"--trainer\.max_epoch: .* did you mean --trainer\.max_epochs\?"),
    ("fit ~ --max_epochs 4", r"--max_epochs: .* did you mean --trainer\.max_epochs\?"),
    ("fit ~ --model-path llama", r"--model-path: .* did you mean --model\.path\?"),
    (
        "fit ~ --model.weights.group-size 8",
        r"--model\.weights\.group-size: .* did you mean --model\.weights\.group_size",
    ),
    ("fit ~ --model.weights.bits.x 8", r"--model\.weights\.bits\.x: model\.weights\.bits holds a value, and nothing"),
    ("fit ~ --model.weights.wibble 8", r"--model\.weights\.wibble: .*; model\.weights has bits, group_size, .*"),
    ("fit ~ --wibble", r"--wibble: there is no such setting"),
    ("fit ~ -model.path llama", r"-model\.path: .* did you mean --model\.path\?"),
    (
        "fit ~ model.path=llama",
        r"model\.path=llama: a setting begins with two dashes; did you mean --model\.path=llama\?",
    ),
    ("fit ~ --model.weights.bits:4", r"--model\.weights\.bits:4: .*; write --model\.weights\.bits=4"),
    ("fit ~ llama", r"llama: no flag stands in front of it; did you mean --model\.path llama\?"),
    ("fit own.yaml", r"own\.yaml: no flag stands in front of it; did you mean --config own\.yaml\?"),
    ("fit ~ --model.path", r"--model\.path: its value is missing; write --model\.path VALUE"),
    (
        "fit ~ --trainer.callbacks+ EarlyStoping",
        r"trainer\.callbacks: there is no class EarlyStoping; .* EarlyStopping\?",
    ),
    ("fit ~ --trainer.callbacks+ EarlyStopping", r"EarlyStopping cannot do without monitor; add it to its init_args"),
    (
        "fit ~ --trainer.callbacks+ EarlyStopping --trainer.callbacks.monitr loss",
        r"--trainer\.callbacks\.monitr: EarlyStopping .* has no setting monitr; did you mean monitor\?",
    ),
    # names from other tools
    ("fit ~ --bits 4", r"--bits: .* did you mean --model\.weights\.bits or --model\.activations\.bits\?"),
    ("fit ~ --wbits 4", r"--wbits: .* did you mean --model\.weights\.bits\?"),
    ("fit ~ --model llama", r"model: llama is not accepted for a whole section; did you mean --model\.path llama\?"),
    ("fit ~ --group_size=128", r"--group_size: .* did you mean --model\.weights\.group_size\?"),
    ("fit ~ --epochs 2", r"--epochs: .* did you mean --trainer\.max_epochs\?"),
    ("fit ~ --output_dir out", r"--output_dir: .* did you mean --trainer\.default_root_dir\?"),
    ("fit ~ --resume", r"--resume: .*; a run goes on with --ckpt_path last"),
    ("fit ~ --tasks piqa", r"--tasks: .*; tasks are measured by the command test: --zero_shot"),
    # presets and files
    ("fit --config w4a5.yaml", r"--config: there is no file w4a5\.yaml, .* did you mean w4a4, best/w4a4, fast/w4a4\?"),
    ("fit --config best/w3a16g12", r"--config: .* did you mean best/w3a16g128, \S+, \S+\?"),
    ("fit --config W4A4.yaml", r"--config: there is no file W4A4\.yaml, .* did you mean w4a4, "),
    ("fit --config ./own.yaml", r"--config: there is no file \./own\.yaml"),
    ("fit --config old-run", r"--config: old-run is a folder, .* did you mean the run's old-run/config\.yaml\?"),
    ("fit --config nothing", r"--config: nothing is a folder, and a file is needed; there is no configuration in it"),
    ("fit --config empty.yaml", r"--config: empty\.yaml: the file is empty"),
    ("fit --config braces.yaml", r"--config: braces\.yaml: the file is empty"),
    ("fit --config number.yaml", r"--config: number\.yaml, line 1: model: 3 is not accepted for a section; .* path, "),
    (
        "fit --config number-inside.yaml",
        r"--config: number-inside\.yaml, line 2: model\.weights: 4 is not accepted for a section; .* such as bits, ",
    ),
    ("fit --config null.yaml", r"--config: null\.yaml, line 2: data\.samples: null is not accepted; leave the key out"),
    ("fit --config null-section.yaml", r"--config: null-section\.yaml, line 1: model: null is not accepted for a sec"),
    ("fit --config comments.yaml", r"--config: comments\.yaml: the file is empty"),
    ("fit --config list.yaml", r"--config: list\.yaml, line 1, column 1: the file holds a list where keys and values"),
    ("fit --config text.yaml", r"--config: text\.yaml, line 1, column 1: the file holds a text where keys and values"),
    ("fit --config latin.yaml", r"--config: latin\.yaml: the file is not UTF-8 text"),
    ("fit --config bracket.yaml", r"--config: bracket\.yaml, line 2, column 1: the file ends here, and a bracket"),
    ("fit --config tab.yaml", r"--config: tab\.yaml, line 2, column 1: a tab stands where YAML accepts spaces only"),
    ("fit --config indented.yaml", r"--config: indented\.yaml, line 4, column 4: this line is not indented like those"),
    ("fit --config one-colon-more.yaml", r"--config: one-colon-more\.yaml, line 2, column 10: a second colon"),
    ("fit --config twice.yaml", r"--config: twice\.yaml, line 4, column 1: model is here a second time, after line 1"),
    (
        "fit --config twice-inside.yaml",
        r"--config: twice-inside\.yaml, line 4, .*: model\.weights\.bits is here a second",
    ),
    (
        "fit --config quoted.yaml",
        r"quoted\.yaml, line 1: model: @org/llama is not accepted; expected its settings: model\.path",
    ),
    ("fit --config quoted-colons.yaml", r"quoted-colons\.yaml, line 1: data: a: b: c is a text"),
    ("fit --config merge.yaml", r"--config: merge\.yaml, line 1, column 1: the file has no key of its own"),
    ("fit --config section.yaml", r"--config: section\.yaml, line 1, column 1: model is empty"),
    ("fit --config colon.yaml", r"colon\.yaml, line 1: model: .* a space belongs behind the colon: path: tiny-llama"),
    (
        "fit --config misspelt.yaml",
        r"misspelt\.yaml, line 3: .* model\.weigths\.bits; did you mean model\.weights\.bits\?",
    ),
    (
        "fit --config deep.yaml",
        r"deep\.yaml, line 4: .* model\.activations\.bit; did you mean model\.activations\.bits\?",
    ),
    ("fit --config top.yaml", r"top\.yaml, line 2: there is no setting modle\.path; did you mean model\.path\?"),
    (
        "fit --config word.yaml",
        r"word\.yaml, line 3: model\.weights\.bits: four is not accepted; expected a whole number",
    ),
    (
        "fit --config no-list.yaml",
        r"no-list\.yaml, line 2: data\.evaluation: wikitext2 is not a list; write \[wikitext2\]",
    ),
    ("fit --config callback.yaml", r"callback\.yaml, line 2: .* there is no class EarlyStoping; .* EarlyStopping\?"),
    ("fit --config argument.yaml", r"argument\.yaml, line 6: EarlyStopping .* has no setting patiense; .* patience\?"),
    ("fit --config strategy.yaml", r"strategy\.yaml, line 4: .* has no setting segmnts; did you mean segments\?"),
    # values
    ("fit ~ --model.weights.bits four", r"model\.weights\.bits: four is not accepted; expected a whole number"),
    ("fit ~ --model.weights.bits 16", r"model\.weights\.bits: 16 is not a width from 2 to 8"),
    ("fit ~ --model.activations 4", r"model\.activations: 4 is not accepted; .* null or its settings: --model\.activ"),
    ("fit ~ --model.clipping.lr -1", r"model\.clipping\.lr: -1\.0 is not a number above 0"),
    (
        "fit ~ --model.rounding.method up",
        r"model\.rounding\.method: up is not accepted; expected nearest, lear",
    ),
    (
        "fit ~ --data.evaluation wikitext2",
        r"data\.evaluation: wikitext2 is not a list; write --data\.evaluation '\[wik",
    ),
    ("fit ~ --data.evaluation [wikitext2, c4]", r"data\.evaluation: the shell has split .*: .* '\[wikitext2, c4\]'"),
    ("fit ~ --data.samples 100", r"data\.samples: 100 windows are asked for, but 'calibration\.npy' has 6 rows"),
    ("fit ~ --data.dataset gone.npy", r"data\.dataset: there is no file 'gone\.npy'"),
    ("fit ~ --model.path tiny-llama --data.dataset gone.txt", r"data\.dataset: there is no file 'gone\.txt'"),
    ("fit ~ --model.path tiny-llama --data.dataset table.csv", r"data\.dataset: .*table\.csv"),
    ("fit ~ --data.sequence_length 64", r"data\.sequence_length: 64 is more than the 32 positions of the model"),
    ("fit ~ --data.micro_batch_size 3", r"data\.micro_batch_size: 3 is not between 1 and data\.batch_size, 1"),
    ("fit ~ --model.path nowhere", r"model\.path: there is no folder 'nowhere'; .* or one of: tiny-llama"),
    ("fit ~ --model.path nothing", r"model\.path: nothing has no config\.json"),
    ("fit ~ --model.path gpt2", r"model\.path: gpt2/config\.json: the family 'gpt2' is not supported; known: .*llama"),
    # the trainer
    (
        "fit ~ --trainer.accelerator gpu",
        rf"trainer\.accelerator: PyTorch finds no device of the kind gpu.*; {NO_DEVICE}",
    ),
    ("fit ~ --trainer.accelerator cuda:3", r"trainer\.accelerator: cuda:3 is .* to gpu, and trainer\.devices to \[3\]"),
    ("fit ~ --trainer.accelerator abacus", rf"trainer\.accelerator: abacus is .* expected auto, cpu, .*; {NO_DEVICE}"),
    ("fit ~ --trainer.devices 0", r"trainer\.devices: 0 is not a positive number of devices"),
    ("fit ~ --trainer.devices all", r"trainer\.devices: all is not accepted; expected a number"),
    ("fit ~ --trainer.precision fp16", r"trainer\.precision: fp16 is not accepted; expected 32-true, bf16-mixed"),
    ("fit ~ --trainer.strategy fsdp", r"trainer\.strategy: blocks cannot be calibrated with fsdp; accepted: auto, ddp"),
    ("fit ~ --trainer.accumulate_grad_batches 0", r"trainer\.accumulate_grad_batches: 0 is not a positive number"),
    ("fit ~ --trainer.limit_train_batches 2.5", r"trainer\.limit_train_batches: .*2\.5"),
    ("fit ~ --trainer.default_root_dir notes", r"trainer\.default_root_dir: notes is not a folder"),
    ("fit ~ --ckpt_path gone.ckpt", r"ckpt_path: gone\.ckpt is not a file; last goes on from"),
    ("fit ~ --ckpt_path notes", r"ckpt_path: notes is not a checkpoint"),
    # runs and exports
    (
        "test",
        r"trainer\.default_root_dir: there is no run in runs/default; calibrate it first: train\.py fit --config ",
    ),
    (
        "export ~ --format gguf",
        r"trainer\.default_root_dir: there is no run in run; .*: train\.py fit --config w4a4\.yaml ",
    ),
    ("generate --prompt Once", r"trainer\.default_root_dir: there is no run in runs/default; calibrate it first: "),
    (
        "generate --config runs/a/config.yaml",
        r"--config: there is no file runs/a/config\.yaml, and so no run in runs/a",
    ),
    (
        "generate ~ --prompt Once --packed no",
        r"packed: there is no packed model in no; this command writes one: export",
    ),
    ("export ~ --format awq", r"format: awq is not accepted; expected hf, compressed-tensors"),
    ("fit ~ --export.format gptq", r"export\.format: gptq cannot hold this model exactly: .*; formats that can: hf"),
    ("export ~ --shard_bytes 5GB", r"shard_bytes: 5GB is not accepted; expected a whole number"),
    ("test ~ --zero_shot piqa", r"zero_shot: piqa is not a list; write --zero_shot '\[piqa\]'"),
    ("compare ~ --methods=[rtn,awqq]", r"methods: awqq is not accepted; expected rtn, "),
    ("plan ~ --teraflops 0", r"teraflops: 0 is not a positive number"),
    ("plan ~ --devices 0", r"devices: 0 is not a positive number"),
]


@pytest.fixture
def line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs the program on what is typed, and returns its one line without ``error: ``."""
    monkeypatch.chdir(folder)
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)

    def line(typed: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(typed.replace("~", BASE))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert out == ""
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        lines = [each for each in err.splitlines() if not each.startswith("Seed set")]
        assert [each for each in lines[1:] if not re.fullmatch(r"see: train\.py( \w+)? --help", each)] == [], err
        assert lines[0].startswith("error: "), err
        return lines[0].removeprefix("error: ")

    return line


@pytest.mark.parametrize(("typed", "expected"), MISTAKES, ids=[typed or "nothing" for typed, _ in MISTAKES])
def test_a_mistake_gets_a_line(typed: str, expected: str, line: Callable[[str], str]) -> None:
    assert re.match(expected, line(typed)), line(typed)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("fit --config w4a4.yaml --bits 4", r"error: --bits: .*\nsee: train\.py fit --help\n"),
        ("fit --config tab.yaml", r"error: --config: tab\.yaml, line 2, column 1: .*\n"),
        ("generate --prompt Once", r"error: trainer\.default_root_dir: there is no run in runs/default; .*\n"),
    ],
)
def test_a_process_of_its_own(typed: str, expected: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *shlex.split(typed)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    shown = "".join(each for each in done.stderr.splitlines(keepends=True) if not each.startswith("Seed set"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(expected, shown), shown


def test_names_of_other_tools_lead_to_settings_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["fit", "--config", "w4a4.yaml", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out) | {"config": None}
    for key in {key for keys in KEYS.values() for key in keys}:
        section = settings
        for part in key.split("."):
            assert part in section, key
            section = section[part]


@pytest.mark.parametrize("name", ["w4a4", "w4a4.yaml", "w4a4.yml", "best/w4a4"])
def test_a_preset_needs_no_suffix(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as caught:
        run(["fit", "--config", name, "--print_config"])
    assert caught.value.code == 0
    assert "activations:\n    bits: 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("devices", "refused"), [("1", False), ("2", False), ("-1", False), ("4", True), ("[0,5]", True), ("[1]", False)]
)
def test_more_devices_than_there_are(devices: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = {"accelerator": "gpu", "devices": devices}
    if not refused:
        check_devices(options)
        return
    with pytest.raises(ConfigurationError, match=r"^trainer\.devices: .*: cpu, cuda:0 to cuda:1$"):
        check_devices(options)
