"""Every command in the documentation is one that works: accepted as it stands, and the tutorial's are run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import entry_points, metadata
from pathlib import Path
from typing import Any

import pytest
from documented import COMMANDS, PAGES, ROOT, Command
from lightning.pytorch.cli import LightningArgumentParser

from omniquant_pl.cli import program as cli
from omniquant_pl.commands.planning import BlockTimes, Job, plan
from omniquant_pl.distributed import BlockParallelStrategy, DataParallelStrategy
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.trainer.checks import chosen_strategy

EXTRAS = set(metadata("omniquant-pl").get_all("Provides-Extra", []))
SCRIPTS = {script.name: script for script in entry_points(group="console_scripts")}
OURS = [command for command in COMMANDS if command.words[:2] == ["python", "train.py"]]
OTHERS = [command for command in COMMANDS if command not in OURS]
LAUNCHED = [command for command in COMMANDS if command.words[0] in ("torchrun", "sbatch")]
TINY_LLAMA = json.loads((ROOT / "omniquant_pl" / "models" / "tiny-llama" / "config.json").read_text())
BLOCKS = {"tiny-llama": TINY_LLAMA["num_hidden_layers"], "docs/llama-2-70b.md": 80}
LEAST_BLOCKS = 32  # of a FOLDER on any other page
TUTORIAL = [command.words[2:] for command in OURS if command.page == "docs/tutorial.md"]


def with_presets(words: list[str]) -> list[str]:
    """The configuration of a run in the place that its preset gives it is that preset's."""
    found = [re.sub(r"^(?:runs/)?([\w/-]+)/config\.yaml$", r"\1.yaml", word) for word in words]
    return ["w4a4.yaml" if word in ("RUN.yaml", "factors.yaml", "symmetric.yaml") else word for word in found]


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    """The program's, built once."""
    found = []

    class Stopped(Exception):  # noqa: N818 (nothing is wrong)
        pass

    def stop(_: Any, parser: LightningArgumentParser, __: Any) -> None:
        found.append(parser)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.OmniQuantCLI, "parse_arguments", stop)
        with pytest.raises(Stopped):
            cli.run([])
    return found[0]


@pytest.fixture
def build(parser: LightningArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Parses a command line and builds everything but the trainer; nothing is read or written."""
    monkeypatch.chdir(tmp_path)

    def build(words: list[str], needs: str = "") -> Any:
        config = parser.parse_args(cli._with_config_paths(with_presets(words)))
        if needs != "tensorboard":
            config = parser.instantiate(config)
        assert list(tmp_path.iterdir()) == []
        return config[words[0]]

    return build


def share_out(page: str, subcommand: str, settings: Any, devices: int | None = None, nodes: int | None = None) -> None:
    """Refuses what the program would: segments, samples and steps that do not go into devices or blocks."""
    if subcommand not in ("fit", "plan"):
        return
    trainer, data = settings.trainer, settings.data
    if subcommand == "plan":
        devices, nodes, segments = settings.devices, settings.nodes, settings.segments
    else:
        given = BLOCKS["tiny-llama"] if trainer.devices == "auto" else int(trainer.devices)
        devices, nodes, segments = devices or given, nodes or trainer.num_nodes, None
    strategy = chosen_strategy(vars(trainer))
    if isinstance(strategy, BlockParallelStrategy):
        segments = segments or strategy.segments
    elif isinstance(strategy, DataParallelStrategy):
        segments = 1
    if subcommand == "fit" and segments is None:
        segments = devices * nodes
    blocks = BLOCKS.get(settings.model.path) or BLOCKS.get(page, LEAST_BLOCKS)
    job = Job((1,) * blocks, data.samples, 1, 1, data.batch_size, 1)
    plan(job, BlockTimes(1, 1, 1, 1), devices, nodes, segments)


def test_pages_have_commands() -> None:
    pages = {command.page for command in OURS}
    assert {"README.md", "docs/tutorial.md", "docs/llama-2-7b.md", "docs/deployment.md"} <= pages
    shown = sum(len(re.findall(r"^    python train\.py ", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert len(OURS) == shown > 40


@pytest.mark.parametrize("command", OURS, ids=str)
def test_command_is_accepted(command: Command, build: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = command.words[2:]
    if command.needs == "refused":
        with pytest.raises(ConfigurationError) as refused:
            build(words)
        page = (ROOT / command.page).read_text()
        assert f"error: {refused.value}" in page
    elif "--help" in words or "--print_config" in words:
        with pytest.raises(SystemExit) as stopped:
            build(words)
        assert stopped.value.code == 0
        assert "model" in capsys.readouterr().out
    else:
        share_out(command.page, words[0], build(words, command.needs))


@pytest.mark.parametrize("command", LAUNCHED, ids=str)
def test_what_a_launcher_hands_on_is_accepted(command: Command, build: Callable[..., Any]) -> None:
    """The script for SLURM puts `fit` in front of its arguments."""
    script = "train.py" if command.words[0] == "torchrun" else "configs/cluster/slurm.sbatch"
    place = command.words.index(script)
    handed_on = command.words[place + 1 :]
    if command.words[0] == "torchrun":
        share_out(command.page, handed_on[0], build(handed_on))
        return
    options = [*(ROOT / script).read_text().splitlines(), *command.words[1:place]]
    found = dict(match.groups() for match in map(re.compile(r"(?:#SBATCH )?--([\w-]+)=(\d+)$").match, options) if match)
    share_out(command.page, "fit", build(["fit", *handed_on]), int(found["ntasks-per-node"]), int(found["nodes"]))


@pytest.mark.parametrize(
    "words",
    [
        "fit --config w3a16.yaml --trainer.devices 8 --trainer.strategy block_parallel",
        "fit --config w4a4.yaml --trainer.devices 8",
        "plan --config w4a4.yaml --devices 8 --nodes 4",
    ],
)
def test_what_devices_cannot_share_is_refused(words: str, build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"data.batch_size|segments"):
        share_out("README.md", words.split()[0], build(words.split()))


def _is_sound(command: Command) -> bool:
    program, *rest = command.words
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    match program:
        case "make":
            return re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
        case "pip":
            extras = [name for word in rest for name in re.findall(r"\[(\w+)\]", word)]
            return set(extras) <= EXTRAS
        case "python" if rest[0].endswith(".py"):
            source = (ROOT / rest[0]).read_text()
            return all(f'"{flag}"' in source for flag in flags)
        case "python" if rest[:2] == ["-m", "pytest"]:
            return all((ROOT / word).exists() for word in rest[2:] if not word.startswith("-"))
        case "omniquant":
            return "omniquant" in SCRIPTS and flags == ["--print_completion"]
        case ".":
            return rest == [".venv/bin/activate"]
    return False


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_other_commands_are_sound_or_say_what_they_need(command: Command) -> None:
    assert _is_sound(command) or command.needs


def test_omniquant_is_the_program() -> None:
    assert SCRIPTS["omniquant"].load() is cli.main


@pytest.mark.slow
@pytest.mark.report
def test_the_tutorial_runs(
    token_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From `make fit` to text, in the page's order, on a few tokens."""
    monkeypatch.chdir(tmp_path)
    assert "\tpython train.py fit --config w4a4.yaml\n" in (ROOT / "Makefile").read_text().replace("$(BIN)/", "")
    quick = ["--data.samples=2", "--data.sequence_length=16", f"--data.evaluation=[{token_files[1]}]"]
    machine = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    cli.run(["fit", "--config", "w4a4.yaml", *quick, *machine])
    report = Path("runs/w4a4/report.html")
    written = report.stat().st_mtime_ns
    assert Path("runs/w4a4/model/config.json").is_file()
    done = [words for words in TUTORIAL if words[0] in ("test", "export", "generate")]
    assert [words[0] for words in done] == ["test", "export", "export", "generate"]
    for words in done:
        cli.run(words)
    assert report.stat().st_mtime_ns > written  # with what test has measured
    shown = capsys.readouterr().out
    assert "gguf: out" in shown
    assert Path("out/model.gguf").read_bytes()[:4] == b"GGUF"
    assert Path("runs/w4a4/packed/config.json").is_file()
    assert "tokens" in shown
