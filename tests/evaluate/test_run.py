"""The three variants of a run, side by side."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.evaluate import VARIANTS, Evaluation, perplexity_table
from omniquant_pl.hidden_states import MemoryBudget
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec


@pytest.fixture
def evaluation(llama: Path, tokens: Tensor, tmp_path: Path) -> Evaluation:
    model = OmniQuantModel(path=str(llama), weights=WeightSpec(bits=3))
    sets = {"all": tokens, "first": tokens[:1]}
    return Evaluation(
        model, RunFolder(tmp_path), sets, MemoryBudget(torch.device("cpu"), tmp_path / "streams"), nullcontext
    )


def factors_of_block(index: int, llama: Path, logit: float) -> dict[str, Tensor]:
    """Clipping factors that keep the whole range if the logit is large."""
    model = OmniQuantModel(path=str(llama), weights=WeightSpec(bits=3))
    return {
        f"{linear}.clip.{end}": torch.full((model.source.block_shapes(0)[f"{linear}.weight"][0], 1), logit)
        for linear in model.source.layouts[0].linears
        for end in ("upper", "lower")
    }


def test_every_evaluation_set_is_measured(evaluation: Evaluation) -> None:
    measured = evaluation.measure("full_precision")
    assert set(measured) == {"all", "first"}
    assert measured["all"] != measured["first"]


def test_factors_that_clip_nothing_are_round_to_nearest(evaluation: Evaluation, llama: Path, tmp_path: Path) -> None:
    for index in range(2):
        RunFolder(tmp_path).save_factors(index, factors_of_block(index, llama, 30.0))
    assert evaluation.measure("quantized") == evaluation.measure("round_to_nearest")


def test_factors_that_clip_are_used(evaluation: Evaluation, llama: Path, tmp_path: Path) -> None:
    for index in range(2):
        RunFolder(tmp_path).save_factors(index, factors_of_block(index, llama, 0.0))
    assert evaluation.measure("quantized") != evaluation.measure("round_to_nearest")


def test_unfinished_run_is_refused_by_the_missing_file(evaluation: Evaluation, llama: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_factors(0, factors_of_block(0, llama, 4.0))
    with pytest.raises(ConfigurationError, match="has not finished block 1") as caught:
        evaluation.measure("quantized")
    assert str(tmp_path / "blocks" / "00001.safetensors") in str(caught.value)


def test_factors_of_other_settings_are_refused(evaluation: Evaluation, llama: Path, tmp_path: Path) -> None:
    factors = factors_of_block(0, llama, 4.0)
    RunFolder(tmp_path).save_factors(0, {name: f for name, f in factors.items() if "up_proj" not in name})
    with pytest.raises(ConfigurationError, match=r"mlp\.up_proj\.clip\.\w+ differs"):
        evaluation.measure("quantized")


def test_table_has_a_row_for_every_set_and_a_column_for_every_variant() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        measured = {"full_precision": 1.25, "round_to_nearest": 3.0, "quantized": 2.5}
        console.print(perplexity_table({"a-set": measured, "b-set": {"full_precision": 7.0}}))
    header, *rows = [line for line in capture.get().splitlines() if re.search(r"\w", line)]
    assert [name for name in VARIANTS if name.replace("_", " ") in header] == list(VARIANTS)
    assert [re.findall(r"[\w.-]+", row) for row in rows] == [
        ["a-set", "1.250", "3.000", "2.500"],
        ["b-set", "7.000"],
    ]
