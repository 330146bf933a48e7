"""Plans: how a job is shared out, and times against sums by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from omniquant_pl.checkpoint import locate_model
from omniquant_pl.cli.program import run
from omniquant_pl.commands.planning import BlockTimes, Job, plan, read_skeleton
from omniquant_pl.errors import ConfigurationError

TIMES = BlockTimes(read=1.0, forward=0.1, step=0.5, fold=2.0)
JOB = Job(costs=(100,) * 8, samples=16, tokens=32, channels=4, batch_size=4, epochs=10, factors=3)
BLOCK = 1.0 + 2.0 + 16 * (4 * 0.1 + 10 * 0.5)


def test_one_device_takes_all_blocks() -> None:
    found = plan(JOB, TIMES, devices=1, nodes=1)
    assert (found.segments, found.processes_per_segment, found.longest_segment) == (1, 1, 8)
    assert math.isclose(found.hours * 3600, 8 * BLOCK)
    assert found.efficiency == 1.0
    assert found.network == 0
    assert found.stream_memory == 5 * 16 * 32 * 4 * 4


def test_segments_start_behind_a_pass_that_all_share() -> None:
    found = plan(JOB, TIMES, devices=2, nodes=2)
    inputs = 6 * 1.0  # blocks in front of the last segment are read more slowly than four devices compute
    assert (found.segments, found.longest_segment) == (4, 2)
    assert math.isclose(found.hours_of_inputs * 3600, inputs)
    assert math.isclose(found.hours * 3600, inputs + 2 * BLOCK)
    assert math.isclose(found.efficiency, 8 * BLOCK / (4 * (inputs + 2 * BLOCK)))
    assert found.network == 16 * 32 * 4 * 4 // 4 * 3  # bytes of a quarter of the samples, for three others


def test_processes_of_a_segment_share_its_samples() -> None:
    found = plan(JOB, TIMES, devices=2, nodes=2, segments=2)
    inputs = 4 * 1.0
    assert found.processes_per_segment == 2
    assert math.isclose(found.hours * 3600, inputs + 4 * (3.0 + 8 * (4 * 0.1 + 10 * 0.5)))


def test_stitching_takes_two_more_passes_and_some_epochs() -> None:
    found = plan(replace(JOB, stitch_epochs=3), TIMES, devices=2, nodes=1)
    inputs = 4 * 1.0
    stitched = 3.0 + 16 * (4 * 0.1 + 3 * 0.5)
    passed = 3.0 + 16 * 4 * 0.1
    assert math.isclose(found.hours * 3600, inputs + 4 * BLOCK + 2 * inputs + stitched + 3 * passed)


def test_more_segments_than_processes_are_calibrated_in_turn() -> None:
    found = plan(JOB, TIMES, devices=2, nodes=1, segments=4)
    inputs = 6 * 1.0  # in front of the last of four segments
    assert (found.segments, found.processes_per_segment, found.longest_segment) == (4, 1, 2)
    assert math.isclose(found.hours * 3600, inputs + 4 * BLOCK)
    assert found.network == 16 * 32 * 4 * 4 // 2 * 2  # bytes of half of the samples, for the two of the other process
    fewer = plan(JOB, TIMES, devices=2, nodes=1, segments=2)
    assert found.stream_memory - fewer.stream_memory == 2 * 16 * 32 * 4 * 4  # the inputs of one segment more


@pytest.mark.parametrize(
    ("devices", "segments", "key"),
    [
        (0, None, "devices"),
        (3, 2, "segments"),
        (2, 0, "segments"),
        (2, 3, "segments"),
        (3, None, "data.samples"),
        (8, 1, "data.batch_size"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(devices: int, segments: int | None, key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan(JOB, TIMES, devices, 1, segments)
    assert caught.value.key == key


def test_a_configuration_alone_gives_the_sizes(llama: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(llama)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = read_skeleton(str(tmp_path))
    model = LlamaForCausalLM(config)
    blocks = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in model.model.layers]
    assert list(found.costs) == blocks
    assert found.others + sum(found.costs) == sum(parameter.numel() for parameter in model.parameters())


def test_an_embedded_model_is_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(locate_model("tiny-llama") / "model.safetensors")
    blocks = [tensor.numel() for name, tensor in weights.items() if ".layers." in name and tensor.ndim == 2]
    assert sum(read_skeleton("tiny-llama").costs) == sum(blocks)
    run(["plan", "--config=w4a16g128.yaml", "--model.path=tiny-llama", "--teraflops=100", "--devices=1"])
    assert "an estimate: 100 TFLOP/s" in " ".join(capsys.readouterr().out.split())


def test_of_a_hub_repository_the_configuration_alone_is_fetched(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def download(repository: str, filename: str) -> str:
        fetched.append((repository, filename))
        return str(shutil.copy(llama / filename, tmp_path))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = read_skeleton("owner/name")
    assert fetched == [("owner/name", "config.json")]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert found == read_skeleton(str(llama))


def test_a_hub_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, filename: str) -> str:
        raise LocalEntryNotFoundError("nothing in the cache\nand no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        ConfigurationError, match=r"^model\.path: .*'owner/name', .* nothing in the cache and no connect"
    ):
        read_skeleton("owner/name")


@pytest.mark.parametrize("path", ["nowhere", "./nowhere"])
def test_a_model_that_is_not_there(path: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^model\.path: there is no folder '{path}'"):
        read_skeleton(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": "1"}, "'num_hidden_layers' expected int"),
        ({"pad_token_id": 32000}, "pad_token_id is not a token below vocab_size"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is no causal language model"),
        ({"torch_dtype": "auto"}, "torch_dtype is 'auto'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is not above 0"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1).to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=rf"^model\.path: .*config\.json: .*{expected}"):
        read_skeleton(str(tmp_path))


@pytest.mark.parametrize(("stored", "byte_count"), [("float16", 4), ("bfloat16", 2)])
def test_the_command_estimates_without_weights(
    stored: str, byte_count: int, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig.from_pretrained(llama).to_dict() | {"dtype": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    memory = []
    for samples in (8000, 16000):
        sizes = [f"--data.samples={samples}", "--data.sequence_length=32", "--devices=1"]
        run(["plan", "--config=w4a16.yaml", f"--model.path={tmp_path}", "--teraflops=1", *sizes])
        memory += re.findall(r"hidden states of a process │ ([\d.]+) MB", " ".join(capsys.readouterr().out.split()))
    streams = 5 * 8000 * 32 * config["hidden_size"] * byte_count / 1e6
    assert float(memory[1]) - float(memory[0]) == pytest.approx(streams, abs=0.11)


def test_the_command_measures_and_estimates(
    llama: Path,
    token_files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # Lightning sets it in a process that has launched others
    calibration, evaluation = token_files
    command = [
        "plan",
        "--config=w4a4.yaml",
        f"--model.path={llama}",
        f"--data.dataset={calibration}",
        "--data.samples=6",
        f"--data.evaluation=['{evaluation}']",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--devices=2",
    ]
    run(command)
    assert "measured on this machine's cpu" in " ".join(capsys.readouterr().out.split())
    run([*command, "--teraflops=100"])
    assert "an estimate: 100 TFLOP/s" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()
    for strategy, segments in (("ddp", 1), ("block_parallel", 2)):
        options = ["--data.batch_size=2", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
        run([*command, "--teraflops=100", *options])
        assert f"segments │ {segments}, the longest" in " ".join(capsys.readouterr().out.split())
