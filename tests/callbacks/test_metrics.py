"""``metrics.json``: its keys, when it is written, and its numbers against transformers' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kept_blocks import KeepBlocks
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult
from omniquant_pl.callbacks import MetricsCallback
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class HeartbeatMonitor(KeepBlocks):
    """Reads the file after every block, and keeps the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def on_block_end(self, trainer: SequentialTrainer, block: QuantizedBlock, result: BlockResult) -> None:
        super().on_block_end(trainer, block, result)
        self.seen.append(json.loads((trainer.run_folder.path / "metrics.json").read_text()))


class Run:
    """One finished run that all tests here look at."""

    def __init__(self, folder: Path, fit: Callable[..., SequentialTrainer], root: Path) -> None:
        self.folder = folder
        self.watch = HeartbeatMonitor()
        weights, activations = WeightSpec(bits=3, group_size=20), ActivationSpec(bits=6)
        self.model = OmniQuantModel(str(folder), weights, activations)
        fit(self.model, [self.watch, MetricsCallback()], max_epochs=2, default_root_dir=root)
        self.metrics = json.loads((root / "metrics.json").read_text())


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {}


@pytest.fixture
def run(
    runs: dict[str, Run],
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    tmp_path: Path,
) -> Run:
    if not runs:
        folder = make_llama(num_key_value_heads=2, num_hidden_layers=3)
        runs["only"] = Run(folder, fit, tmp_path)
    return runs["only"]


def perplexity_of(logits: Tensor, tokens: Tensor) -> float:
    nll = -logits.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    return math.exp(float(nll.mean()))


def test_keys(run: Run) -> None:
    metrics = run.metrics
    assert set(metrics) == {
        "model",
        "scheme",
        "perplexity",
        "blocks",
        "seconds",
        "peak_memory_bytes",
        "bits_per_weight",
        "size_bytes",
        "versions",
        "fingerprint",
        "evaluation_sha256",
        "checksum",
    }
    assert set(metrics["perplexity"]) == {"evaluation"}  # the file's stem
    assert set(metrics["perplexity"]["evaluation"]) == {
        "full_precision",
        "round_to_nearest",
        "quantized",
    }
    for block in metrics["blocks"]:
        assert set(block) == {
            "index",
            "loss_initial",
            "loss_final",
            "relative_error_rtn",
            "relative_error",
            "seconds",
            "epochs",
        }
    assert set(metrics["seconds"]) == {"total", "calibration", "evaluation"}
    assert set(metrics["peak_memory_bytes"]) == {"host", "device"}
    assert set(metrics["size_bytes"]) == {"full_precision", "quantized"}
    assert {"python", "torch", "lightning", "transformers", "omniquant-pl"} <= set(metrics["versions"])


def test_plain_values(run: Run) -> None:
    assert run.metrics["model"] == str(run.folder)
    assert run.metrics["scheme"] == "w3a6g20"
    assert run.metrics["versions"]["torch"] == torch.__version__
    assert [block["index"] for block in run.metrics["blocks"]] == [0, 1, 2]
    assert [block["epochs"] for block in run.metrics["blocks"]] == [2, 2, 2]
    assert run.metrics["peak_memory_bytes"]["host"] > 50e6
    assert run.metrics["peak_memory_bytes"]["device"] == 0
    seconds = run.metrics["seconds"]
    in_blocks = sum(block["seconds"] for block in run.metrics["blocks"])
    assert 0 < in_blocks <= seconds["calibration"] < seconds["total"]
    assert seconds["calibration"] + seconds["evaluation"] <= seconds["total"]


def test_file_is_rewritten_after_every_block(run: Run) -> None:
    assert [len(content["blocks"]) for content in run.watch.seen] == [1, 2, 3]
    for content in run.watch.seen:
        known = {"full_precision"}  # the only one that comes first
        assert set(content["perplexity"]["evaluation"]) == known
        assert content["blocks"] == run.metrics["blocks"][: len(content["blocks"])]


def test_perplexities(run: Run, tokens: Tensor, logits_of: Callable[..., Tensor]) -> None:
    measured = run.metrics["perplexity"]["evaluation"]
    full = perplexity_of(logits_of(run.folder, tokens), tokens)
    assert measured["full_precision"] == pytest.approx(full, rel=1e-6)
    calibrated = perplexity_of(run.watch.logits(run.model, tokens), tokens)
    assert measured["quantized"] == pytest.approx(calibrated, rel=1e-6)
    assert len({round(value, 2) for value in measured.values()}) == 3


def test_errors_are_relative_to_the_full_precision_output(run: Run, token_files: tuple[Path, Path]) -> None:
    """The streams of the calibration, run again through transformers and through the blocks."""
    calibration = torch.from_numpy(np.load(token_files[0]))
    reference = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    with torch.no_grad():
        states = reference(calibration, output_hidden_states=True).hidden_states
        hidden = states[0]
        for index in range(2):  # the last state has passed the final norm
            hidden = run.watch.blocks[index](hidden)
            target = states[index + 1].double()
            error = float((hidden.double() - target).square().mean())
            reported = run.metrics["blocks"][index]
            assert reported["loss_final"] == pytest.approx(error, rel=1e-5)
            relative = error / float(target.square().mean())
            assert reported["relative_error"] == pytest.approx(relative, rel=1e-5)
            assert reported["relative_error_rtn"] != reported["relative_error"]


def sizes(folder: Path, bits: int, group_size: int) -> tuple[int, int, float]:
    """Bytes as stored, bytes with packed weights, bits a quantized weight; written out anew."""
    full = quantized = weights = weight_bits = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        full += tensor.nbytes
        if name.split(".")[-2] not in LINEARS:
            quantized += tensor.nbytes
            continue
        groups = math.ceil(tensor.shape[1] / group_size) * tensor.shape[0]
        packed = tensor.numel() * bits + groups * (bits + 16)
        quantized += math.ceil(packed / 8)
        weights, weight_bits = weights + tensor.numel(), weight_bits + packed
    return full, quantized, weight_bits / weights


def test_sizes(run: Run) -> None:
    full, quantized, bits = sizes(run.folder, bits=3, group_size=20)
    assert run.metrics["size_bytes"] == {"full_precision": full, "quantized": quantized}
    assert run.metrics["bits_per_weight"] == pytest.approx(bits)


def test_sizes_of_a_half_precision_checkpoint_without_the_head(
    make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    whole = LlamaForCausalLM.from_pretrained(make_llama(tie_word_embeddings=True))
    whole.half().model.save_pretrained(tmp_path / "base")
    model = OmniQuantModel(str(tmp_path / "base"), WeightSpec(bits=4, group_size=16))
    trainer = fit(model, [MetricsCallback()], max_epochs=0)
    full, quantized, _ = sizes(tmp_path / "base", bits=4, group_size=16)
    size_bytes = trainer.run_folder.read_metrics()["size_bytes"]
    assert size_bytes == {"full_precision": full, "quantized": quantized}


def test_several_evaluation_sets(
    llama: Path, fit: Callable[..., SequentialTrainer], token_files: tuple[Path, Path]
) -> None:
    data = {"evaluation": [str(path) for path in token_files]}
    trainer = fit(OmniQuantModel(str(llama)), [MetricsCallback()], data, max_epochs=0)
    perplexity = trainer.run_folder.read_metrics()["perplexity"]
    assert list(perplexity) == ["calibration", "evaluation"]
    assert all(len(values) == 3 for values in perplexity.values())
