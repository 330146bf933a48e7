"""Calibration by several processes: equal to one, gone on with after interruptions, refused where it cannot work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from processes import slurm, together
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.callbacks import (
    CheckpointCallback,
    ExportCallback,
    KeepBestState,
    MetricsCallback,
    ReportCallback,
)
from omniquant_pl.distributed import BlockParallelStrategy
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import (
    ActivationSpec,
    ClippingSpec,
    LearningSpec,
    ObjectiveSpec,
    RoundingSpec,
    ScheduleSpec,
    TransformSpec,
    WeightSpec,
)
from omniquant_pl.trainer import SequentialTrainer

Fit = Callable[..., SequentialTrainer]

SCHEMES: dict[str, dict[str, Any]] = {
    "weights": {"weights": WeightSpec(bits=3)},
    "w4a4": {
        "activations": ActivationSpec(bits=4),
        "transform": TransformSpec(),
        "objective": ObjectiveSpec(aug_loss=True),
    },
    "searched": {"transform": TransformSpec(initial="awq", mlp=True), "clipping": ClippingSpec(search=True)},
    "learned": {"rounding": RoundingSpec("learned"), "learning": LearningSpec(ScheduleSpec(decay="linear"))},
    "gptq": {"rounding": RoundingSpec("gptq"), "weights": WeightSpec(bits=3, group_size=16)},
}


@pytest.fixture(scope="session")
def deep(make_llama: Callable[..., Path]) -> Path:
    """Four blocks, so that there are segments."""
    return make_llama(num_hidden_layers=4)


def differences(one: Path, other: Path) -> dict[str, float]:
    """Norm of the difference over the norm, by file and factor."""
    found = {}
    for path in sorted((one / "blocks").iterdir()):
        first, second = load_file(path), load_file(other / "blocks" / path.name)
        assert first.keys() == second.keys()
        for name, factor in first.items():
            distance = (factor.double() - second[name].double()).norm() / factor.double().norm().clamp_min(1e-9)
            found[f"{path.name} {name}"] = float(distance)
    assert found
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "blocks").iterdir())}


def numbers(folder: Path) -> list[float]:
    """Every measured number but times and memory."""
    metrics = json.loads((folder / "metrics.json").read_text())
    blocks = [block[key] for block in metrics["blocks"] for key in sorted(block) if key != "seconds"]
    return [*metrics["perplexity"]["evaluation"].values(), *blocks]


def calibrate(fit: Fit, path: Path, folder: Path, devices: int = 1, **options: Any) -> None:
    """One process's part of a run."""
    scheme = options.pop("scheme", "w4a4")
    callbacks = [MetricsCallback(), *options.pop("callbacks", ())]
    data = {"batch_size": 2} | options.pop("data", {})
    settings = {"strategy": "ddp" if devices > 1 else "auto", "max_epochs": 2} | options
    model = OmniQuantModel(str(path), **SCHEMES[scheme])
    fit(model, callbacks, data, default_root_dir=folder, devices=devices, **settings)


def segments(count: int, **options: Any) -> Any:
    return BlockParallelStrategy(segments=count, **options)


CASES: dict[str, dict[str, Any]] = {
    "w4a4": {"callbacks": [KeepBestState()]},
    "learned": {"data": {"shuffle": True}, "accumulate_grad_batches": 2},  # shares of a batch differ, or are empty
    "gptq": {"data": {"batch_size": 4}},
    # Scales between queries and keys change nothing here, and Adam makes large steps of their gradients' rounding.
    "searched": {"max_epochs": 0},
}


@pytest.mark.parametrize("scheme", CASES)
def test_two_processes_calibrate_as_one(fit: Fit, llama: Path, tmp_path: Path, scheme: str) -> None:
    one, two, options = tmp_path / "one", tmp_path / "two", CASES[scheme]
    calibrate(fit, llama, one, scheme=scheme, **options)
    errors = together(lambda rank: calibrate(fit, llama, two, 2, scheme=scheme, **options), 2)
    assert errors == [None, None]
    assert max(differences(one, two).values()) < 1e-5
    np.testing.assert_allclose(numbers(one), numbers(two), rtol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a4", "learned"])
def test_samples_computed_alone_give_the_factors_of_one_process(
    fit: Fit, llama: Path, tmp_path: Path, scheme: str
) -> None:
    """Sums in another order would be other numbers, which rounding of activations makes worse."""
    options: dict[str, Any] = {"max_epochs": 4, "scheme": scheme}

    def run(name: str, devices: int = 1) -> None:
        data = {"batch_size": 4, "micro_batch_size": 1, "shuffle": True}
        calibrate(fit, llama, tmp_path / name, devices, data=data, callbacks=[KeepBestState()], **options)

    run("one")
    assert together(lambda rank: run("two", 2), 2) == [None, None]
    assert not any(differences(tmp_path / "one", tmp_path / "two").values())
    np.testing.assert_allclose(numbers(tmp_path / "one"), numbers(tmp_path / "two"), rtol=1e-7)


def test_memory_that_runs_out_in_one_process(fit: Fit, llama: Path, tmp_path: Path) -> None:
    """It takes less at once, and the other does not wait for it in vain."""
    forward = BlockModule.forward

    def short(module: BlockModule, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(hidden) > 1:
            raise torch.OutOfMemoryError("too much")
        return forward(module, hidden)

    def run(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(BlockModule, "forward", short)
            calibrate(fit, llama, tmp_path / "two", 2, scheme="weights", data={"batch_size": 4})

    calibrate(fit, llama, tmp_path / "one", scheme="weights", data={"batch_size": 4})
    assert together(run, 2) == [None, None]
    assert max(differences(tmp_path / "one", tmp_path / "two").values()) < 1e-5


@pytest.mark.parametrize("stitched", [{}, {"stitch_epochs": 1}], ids=["drafts", "stitched"])
def test_the_report_knows_the_blocks_of_all_segments(
    fit: Fit, deep: Path, tmp_path: Path, stitched: dict[str, int]
) -> None:
    calibrate(fit, deep, tmp_path / "run", strategy=segments(2, **stitched), callbacks=[ReportCallback()])
    kept = sorted(path.name for path in RunFolder(tmp_path / "run").statistics.iterdir())
    assert kept == [f"{index:05d}.json" for index in range(4)]


class Stop(Callback):
    """Ends the process in the middle of a block, without a word."""

    def __init__(self, block: int) -> None:
        self._block = block

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.index == self._block and batch_idx == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("devices", [1, 2])
def test_what_two_processes_have_begun_any_number_ends(fit: Fit, llama: Path, tmp_path: Path, devices: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    stopping = [CheckpointCallback(every_n_steps=1), Stop(1)]
    errors = together(lambda rank: calibrate(fit, llama, whole, 2), 2)
    together(lambda rank: calibrate(fit, llama, stopped, 2, callbacks=stopping), 2)
    assert errors == [None, None]
    assert (stopped / "last.ckpt").is_file()
    going_on = {"callbacks": [CheckpointCallback()], "ckpt_path": "last"}
    together(lambda rank: calibrate(fit, llama, stopped, devices, **going_on), devices)
    limit = 1e-5 if devices == 1 else 0.0
    assert max(differences(whole, stopped).values()) <= limit


def test_segments_are_the_same_whoever_calibrates_them(fit: Fit, deep: Path, tmp_path: Path) -> None:
    alone, two, mesh = (tmp_path / name for name in ("alone", "two", "mesh"))
    calibrate(fit, deep, alone, strategy=segments(2, stitch_epochs=1))
    errors = together(lambda rank: calibrate(fit, deep, two, 2, strategy=segments(2, stitch_epochs=1)), 2, slurm_of_two)
    four = {"data": {"samples": 4}, "strategy": segments(2, stitch_epochs=1)}
    errors += together(lambda rank: calibrate(fit, deep, mesh, 4, **four), 4)
    assert errors == [None] * 6
    assert bytes_of(alone) == bytes_of(two)
    calibrate(fit, deep, tmp_path / "few", strategy=segments(2, stitch_epochs=1), data={"samples": 4})
    assert max(differences(tmp_path / "few", mesh).values()) < 1e-5
    np.testing.assert_allclose(numbers(alone), numbers(two), rtol=1e-9)
    assert not (two / "segments").exists()


def slurm_of_two(rank: int, size: int, port: int) -> dict[str, str]:
    """Two processes of one node."""
    one_node = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": str(size), "SLURM_NODEID": "0"}
    return slurm(rank, size, port) | one_node | {"SLURM_LOCALID": str(rank)}


def test_nodes_of_slurm_calibrate_as_one(fit: Fit, llama: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    calibrate(fit, llama, one)
    nodes = {"strategy": "ddp", "num_nodes": 2}
    assert together(lambda rank: calibrate(fit, llama, two, **nodes), 2, slurm) == [None, None]
    assert max(differences(one, two).values()) < 1e-5


def test_a_segment_learns_what_the_whole_calibration_would_in_front_of_it(fit: Fit, deep: Path, tmp_path: Path) -> None:
    """The first segment is the beginning of a calibration in order; the others start from full precision."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate(fit, deep, whole)
    calibrate(fit, deep, parts, strategy=segments(2))
    for index in (0, 1):
        name = RunFolder(whole).factor_file(index).name
        first, second = (load_file(folder / "blocks" / name) for folder in (whole, parts))
        assert all(torch.equal(first[key], second[key]) for key in first)


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round-to-nearest of METHOD's first section, a scale for each row, in float64."""
    low, high = weight.amin(1, True).clamp_max(0), weight.amax(1, True).clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


@torch.no_grad()
def error_of_nearest(original: Any, index: int, inputs: torch.Tensor, target: torch.Tensor) -> float:
    """Mean square of a rounded block's error over that of its target."""
    block = original.model.layers[index]
    for parameter in block.parameters():
        if parameter.ndim == 2:
            parameter.copy_(nearest(parameter, 4))
    positions = original.model.rotary_emb(inputs, torch.arange(inputs.shape[1])[None])
    output = block(inputs, position_embeddings=positions, attention_mask=None)
    output = output[0] if isinstance(output, tuple) else output
    return float((output - target).square().mean() / target.square().mean())


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_segment_starts_from_what_transformers_gives_it(
    fit: Fit, deep: Path, token_files: tuple[Path, Path], tmp_path: Path, epochs: int
) -> None:
    """Of full-precision blocks, and when it is stitched, of the quantized ones in front of it."""
    model = OmniQuantModel(str(deep), weights=WeightSpec(bits=4))
    strategy = segments(2, stitch_epochs=epochs)
    fit(model, [MetricsCallback(), ExportCallback()], default_root_dir=tmp_path / "run", strategy=strategy)
    tokens = torch.from_numpy(np.load(token_files[0]))
    original = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float64)
    calibrated = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float64)
    with torch.no_grad():
        hidden = original.model(tokens, output_hidden_states=True).hidden_states
        quantized = calibrated.model(tokens, output_hidden_states=True).hidden_states
    inputs = (quantized if epochs else hidden)[2]
    expected = error_of_nearest(original, 2, inputs, hidden[3])
    block = json.loads((tmp_path / "run" / "metrics.json").read_text())["blocks"][2]
    assert block["index"] == 2
    assert math.isclose(block["relative_error_rtn"], expected, rel_tol=1e-2)  # scales are rounded to what stores them


@pytest.mark.parametrize(("blocks", "expected"), [(1, [True, False]), (None, [True, True])])
def test_the_first_blocks_of_a_segment_are_stitched(
    fit: Fit, deep: Path, tmp_path: Path, blocks: int | None, expected: list[bool]
) -> None:
    """They learn once more; of the others the factors stay."""
    drafts, stitched = tmp_path / "drafts", tmp_path / "stitched"
    calibrate(fit, deep, drafts, strategy=segments(2))
    calibrate(fit, deep, stitched, strategy=segments(2, stitch_epochs=1, stitch_blocks=blocks))
    names = bytes_of(drafts)
    factors = [[load_file(folder / "blocks" / name) for name in names] for folder in (drafts, stitched)]
    changed = [any(not torch.equal(one[key], two[key]) for key in one) for one, two in zip(*factors, strict=True)]
    assert changed == [False, False, *expected]


def test_a_segment_goes_on_where_it_was(fit: Fit, deep: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options: dict[str, Any] = {"strategy": segments(2, stitch_epochs=2)}
    calibrate(fit, deep, whole, **options)

    def stop(block: int, **more: Any) -> Callable[[int], None]:
        callbacks = [CheckpointCallback(every_n_steps=1), Stop(block)]
        return lambda rank: calibrate(
            fit, deep, stopped, 2, callbacks=callbacks, strategy=segments(2, stitch_epochs=2), **more
        )

    together(stop(3), 2)
    assert (stopped / "segments" / "00001" / "last.ckpt").is_file()
    together(stop(2, ckpt_path="last"), 2)  # now while it is stitched
    assert (stopped / "segments" / "00001" / "stitched" / "last.ckpt").is_file()
    calibrate(
        fit, deep, stopped, strategy=segments(2, stitch_epochs=2), callbacks=[CheckpointCallback()], ckpt_path="last"
    )
    assert bytes_of(whole) == bytes_of(stopped)


def test_a_segment_that_fails_leaves_the_trainer_with_its_run(fit: Fit, deep: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    class Fail(CalibrationCallback):
        def on_segment_start(self, trainer: Any, number: int, blocks: range) -> None:
            found.update(trainer=trainer, inside=trainer.run_folder.path)
            raise RuntimeError("a failure")

    with pytest.raises(RuntimeError, match="a failure"):
        calibrate(fit, deep, tmp_path / "run", strategy=segments(2), callbacks=[Fail()], logger=None)
    trainer = found["trainer"]
    assert found["inside"] == tmp_path / "run" / "segments" / "00000"
    assert trainer.run_folder.path == tmp_path / "run"
    assert [Path(logger.log_dir) for logger in trainer.loggers] == [tmp_path / "run" / "logs"]


@pytest.mark.parametrize("stops", [(0,), (1,), (3, 2)], ids=["first block", "second block", "stitched"])
def test_a_segment_of_another_calibration_is_refused_unless_forced(
    fit: Fit, deep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stops: tuple[int, ...]
) -> None:
    """The content of the calibration file has changed, no setting; nothing but segments tells it."""
    tokens, folder = np.random.default_rng(5).integers(0, 64, (6, 16)), tmp_path / "run"
    data = {"dataset": str(tmp_path / "tokens.npy")}
    np.save(data["dataset"], tokens)

    def go_on(callbacks: list[Callback], **checkpoint: Any) -> None:
        callbacks = [CheckpointCallback(every_n_steps=1, **checkpoint), *callbacks]
        strategy = segments(2, stitch_epochs=1)
        calibrate(fit, deep, folder, strategy=strategy, data=data, callbacks=callbacks, ckpt_path="last")

    for block in stops:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            go_on([Stop(block)])
    assert ((folder / "segments" / "00001" / "stitched" / "last.ckpt").is_file()) == (len(stops) == 2)
    assert not (folder / "blocks").exists()
    np.save(data["dataset"], tokens[::-1])
    before = {path: path.read_bytes() for path in (folder / "segments").rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=r"^ckpt_path: .*segments.* other calibration tokens; .*checkpoint"):
        go_on([])
    assert {path: path.read_bytes() for path in before} == before
    go_on([], force=True)
    assert "other calibration tokens; it counts all the same" in caplog.text
    assert len(bytes_of(folder)) == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a batch of one": ({"data": {"batch_size": 1}}, "data.batch_size: 1 samples"),
    "another strategy": ({"strategy": "fsdp"}, "trainer.strategy: "),
    "odd samples": ({"strategy": "block_parallel", "data": {"samples": 5}}, "data.samples: 5 samples"),
    "too many segments": ({"strategy": "block_parallel", "segments": 4}, "trainer.strategy.segments: 4 segments"),
    "stitched rounding": ({"scheme": "learned", "stitch": 1}, "model.rounding.method: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(fit: Fit, llama: Path, tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    options = dict(options)
    if options.keys() & {"segments", "stitch"}:
        options["strategy"] = segments(options.pop("segments", 2), stitch_epochs=options.pop("stitch", 0))
    errors = together(lambda rank: calibrate(fit, llama, tmp_path / "run", 2, **options), 2)
    assert any(message in str(error) for error in errors)
    assert all("ConfigurationError" in str(error) or "RemoteRankError" in str(error) for error in errors)
    assert not (tmp_path / "run" / "blocks").exists()


def test_processes_that_would_do_different_things_are_refused(fit: Fit, llama: Path, tmp_path: Path) -> None:
    def other_tokens(rank: int) -> None:
        calibrate(fit, llama, tmp_path / "run", 2, data={"samples": 4 + 2 * rank})

    def other_folder(rank: int) -> None:
        calibrate(fit, llama, tmp_path / f"run{rank}", 2)

    assert all("process 1" in str(error) and "another data" in str(error) for error in together(other_tokens, 2))
    assert all("is not the folder of process 0" in str(error) for error in together(other_folder, 2))


def test_processes_with_other_libraries_are_refused(
    fit: Fit, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_version(rank: int) -> None:
        if rank:
            monkeypatch.setattr("omniquant_pl.distributed.agreement.version", lambda name: "0.0")
        calibrate(fit, llama, tmp_path / "run", 2)

    errors = together(other_version, 2)
    assert all("process 1" in str(error) and "0.0" in str(error) for error in errors)


def test_a_folder_that_another_job_works_in_is_refused(fit: Fit, llama: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        errors = together(lambda rank: calibrate(fit, llama, tmp_path / "run", 2), 2)
    assert all("another process is calibrating" in str(error) for error in errors)
