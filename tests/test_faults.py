"""Full disks, folders that cannot be written, signals, kills: a clear line, and a calibration that goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest
from interrupted import blocks_of

from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.callbacks import CheckpointCallback
from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import BudgetSpec
from omniquant_pl.trainer import SequentialTrainer
from omniquant_pl.utils.signals import Interrupted, SignalHandler, is_requeued, requeue

Fit = Callable[..., SequentialTrainer]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class FillDisk(CalibrationCallback):
    """Takes the last room once a block is finished."""

    def __init__(self, ballast: Path) -> None:
        self._ballast = ballast

    def on_block_end(self, *_: object) -> None:
        with (
            self._ballast.open("wb", buffering=0) as file,
            pytest.raises(OSError, match="No space left on device"),
        ):
            _write_for_ever(file)


def _write_for_ever(file: FileIO) -> None:
    while True:
        file.write(bytes(4096))


def _send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    time.sleep(1)


@pytest.mark.parametrize("budget", [BudgetSpec(), BudgetSpec(host=0)], ids=["memory", "disk"])
def test_a_full_disk(llama: Path, fit: Fit, small_disk: Path, tmp_path: Path, budget: BudgetSpec) -> None:
    """Nothing that is finished is lost, and the run goes on when there is room again."""

    def calibrate(root: Path, callbacks: list[CalibrationCallback], ckpt_path: str | None = None) -> RunFolder:
        model = OmniQuantModel(str(llama), activation_budget=budget)
        saved = CheckpointCallback(every_n_steps=1)
        trainer = fit(model, [saved, *callbacks], ckpt_path=ckpt_path, max_epochs=2, default_root_dir=root)
        return trainer.run_folder

    whole = blocks_of(calibrate(tmp_path / "whole", []))
    with pytest.raises(OSError, match="No space left on device"):
        calibrate(small_disk / "run", [FillDisk(small_disk / "ballast")])
    folder = RunFolder(small_disk / "run")
    assert blocks_of(folder) == {"00000.safetensors": whole["00000.safetensors"]}
    (small_disk / "ballast").unlink()
    assert blocks_of(calibrate(folder.path, [], "last")) == whole


def test_a_folder_that_cannot_be_written(llama: Path, fit: Fit, small_disk: Path) -> None:
    trainer = fit(OmniQuantModel(str(llama)), max_epochs=0, default_root_dir=small_disk / "run")
    before = blocks_of(trainer.run_folder)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for ckpt_path in (None, "last"):
        with pytest.raises(OSError, match="Read-only file system"):
            fit(OmniQuantModel(str(llama)), max_epochs=0, default_root_dir=small_disk / "run", ckpt_path=ckpt_path)
    assert blocks_of(trainer.run_folder) == before


class Lose(CalibrationCallback):
    """Takes a file away once a block is finished."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_block_end(self, *_: object) -> None:
        if self._path.is_file():
            self._path.rename(self._path.with_name("away"))


class TestLostSource:
    """A disk, or a share of another machine, that is gone in the middle of a calibration."""

    @staticmethod
    def calibrate(fit: Fit, model: Path, root: Path, lost: Path | None, dataset: Path) -> dict[str, bytes]:
        callbacks = [] if lost is None else [Lose(lost)]
        data = {"dataset": str(dataset)}
        trainer = fit(OmniQuantModel(str(model)), callbacks, data, "last", default_root_dir=root)
        return blocks_of(trainer.run_folder)

    def test_model_files(
        self, make_llama: Callable[..., Path], fit: Fit, token_files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        model, dataset = make_llama(), token_files[0]
        weights = model / "model.safetensors"
        whole = self.calibrate(fit, model, tmp_path / "whole", None, dataset)
        with pytest.raises(ConfigurationError, match=r"^model\.path: .*model\.safetensors cannot be read"):
            self.calibrate(fit, model, tmp_path / "run", weights, dataset)
        finished = blocks_of(RunFolder(tmp_path / "run"))
        assert finished == {"00000.safetensors": whole["00000.safetensors"]}
        weights.with_name("away").rename(weights)
        assert self.calibrate(fit, model, tmp_path / "run", None, dataset) == whole

    def test_tokens_are_needed_at_the_start_alone(
        self, llama: Path, fit: Fit, token_files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        dataset = Path(shutil.copy(token_files[0], tmp_path / "tokens.npy"))
        whole = self.calibrate(fit, llama, tmp_path / "whole", None, dataset)
        assert self.calibrate(fit, llama, tmp_path / "run", dataset, dataset) == whole
        with pytest.raises(ConfigurationError, match=r"^data\.dataset: .*tokens\.npy"):
            self.calibrate(fit, llama, tmp_path / "run", None, dataset)
        assert blocks_of(RunFolder(tmp_path / "run")) == whole


class TestInterruption:
    def test_a_signal_is_obeyed_at_once_where_nothing_is_under_way(self) -> None:
        interruption = SignalHandler()
        with interruption.listening(), pytest.raises(Interrupted, match="SIGTERM"):
            _send(signal.SIGTERM)

    def test_it_waits_where_it_is_deferred(self) -> None:
        interruption = SignalHandler()
        with interruption.listening():
            with interruption.deferred():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                assert interruption.is_requested
            with pytest.raises(Interrupted, match="SIGINT"):
                interruption.obey()

    def test_a_second_sigint_does_not_wait(self) -> None:
        interruption = SignalHandler()
        with interruption.listening(), interruption.deferred(), pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT, signal.SIGINT)

    def test_handlers_return(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with SignalHandler().listening():
            assert signal.getsignal(signal.SIGTERM) != before
        assert signal.getsignal(signal.SIGTERM) == before

    @pytest.mark.parametrize(
        ("variables", "job"),
        [
            ({"SLURM_JOB_ID": "12"}, "12"),
            ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ],
    )
    def test_a_job_is_put_into_the_queue_again(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], job: str
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        commands: list[list[str]] = []
        assert requeue(Interrupted(signal.SIGUSR1), lambda command, **_: commands.append(command))
        assert commands == [["scontrol", "requeue", job]]
        assert not requeue(Interrupted(signal.SIGTERM), lambda command, **_: commands.append(command))
        assert len(commands) == 1

    def test_only_a_job_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert not requeue(Interrupted(signal.SIGUSR1))
        assert not is_requeued()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert is_requeued()


class TestProcess:
    """The command line itself."""

    @staticmethod
    def command(llama: Path, token_files: tuple[Path, Path], folder: Path, *more: str) -> list[str]:
        calibration, evaluation = token_files
        return [
            sys.executable,
            str(ROOT / "train.py"),
            "fit",
            "--config=w4a4.yaml",
            f"--model.path={llama}",
            f"--data.dataset={calibration}",
            "--data.samples=6",
            f"--data.evaluation=['{evaluation}']",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={folder}",
            *more,
        ]

    def interrupted(self, command: list[str], number: int, folder: Path, **variables: str) -> tuple[int, str]:
        """Sends a signal when the first block has begun; returns the exit code and what was said."""
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | variables) as process:
            deadline = time.monotonic() + 300
            while not (folder / "last.ckpt").is_file():
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            said = process.communicate(timeout=300)[1]
        return process.returncode, said

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_with_the_command_to_go_on(
        self, llama: Path, token_files: tuple[Path, Path], tmp_path: Path, number: signal.Signals
    ) -> None:
        folder = tmp_path / "run"
        often = ("--checkpoint.every_n_steps=1", "--trainer.max_epochs=400")
        command = self.command(llama, token_files, folder, *often)
        code, said = self.interrupted(command, number, folder)
        assert code == 128 + number
        assert "Traceback" not in said
        line = said.strip().splitlines()[-1]
        assert line.startswith(f"stopped by {number.name}; go on with: python ")
        assert re.search(r"--ckpt_path=last$", line)
        assert (folder / "last.ckpt").is_file()

    @pytest.mark.slow
    def test_a_requeued_job_goes_on(
        self, llama: Path, token_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SLURM is a script that writes down how it was called."""
        folder, programs = tmp_path / "run", tmp_path / "bin"
        programs.mkdir()
        scontrol = programs / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
        scontrol.chmod(0o755)
        variables = {"SLURM_JOB_ID": "7", "PATH": f"{programs}:{os.environ['PATH']}"}
        command = self.command(llama, token_files, folder, "--trainer.max_epochs=20")
        code, _ = self.interrupted([*command, "--checkpoint.every_n_steps=1"], signal.SIGUSR1, folder, **variables)
        assert code == 0
        assert (tmp_path / "called").read_text() == "requeue 7\n"
        run(self.command(llama, token_files, tmp_path / "whole", "--trainer.max_epochs=20")[2:])
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        run(command[2:])
        assert blocks_of(RunFolder(folder)) == blocks_of(RunFolder(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    """The short version of the benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=580, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 of 3 equal, 3 kills hit a running calibration" in result.stdout
