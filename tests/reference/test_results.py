"""Perplexities of trained models, before calibration, against the scores beside the repository."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.evaluate import Evaluation
from omniquant_pl.hidden_states import MemoryBudget
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec

pytestmark = pytest.mark.reference

SCHEMES = {
    "llama-w2a16": WeightSpec(bits=2),
    "llama-w2a16g64": WeightSpec(bits=2, group_size=64),
    "llama-w3a16": WeightSpec(bits=3),
    "llama-w4a16g64": WeightSpec(bits=4, group_size=64),
    "llama-outliers-w2a16g64": WeightSpec(bits=2, group_size=64),
    "llama-outliers-w3a16": WeightSpec(bits=3),
    "llama-outliers-w4a4": WeightSpec(bits=4),
    "llama-outliers-w6a6": WeightSpec(bits=6),
    "opt-outliers-w2a16g64": WeightSpec(bits=2, group_size=64),
    "opt-outliers-w3a16": WeightSpec(bits=3),
    "opt-outliers-w4a4": WeightSpec(bits=4),
    "opt-outliers-w6a6": WeightSpec(bits=6),
}
ACTIVATIONS = {
    "llama-outliers-w4a4": ActivationSpec(bits=4),
    "llama-outliers-w6a6": ActivationSpec(bits=6),
    "opt-outliers-w4a4": ActivationSpec(bits=4),
    "opt-outliers-w6a6": ActivationSpec(bits=6),
}


def row_of(reference: Path, name: str) -> dict[str, float]:
    rows = json.loads((reference / "results.json").read_text())["original"]
    return next(dict(row) for row in rows if row["name"] == name)


def measure(reference: Path, name: str, variant: str, run: Path) -> float:
    folder = reference / "models" / name.rpartition("-")[0]
    model = OmniQuantModel(str(folder), SCHEMES[name], ACTIVATIONS.get(name))
    tokens = {"evaluation": torch.from_numpy(np.load(reference / "evaluation.npy")).long()}
    evaluation = Evaluation(model, RunFolder(run), tokens, MemoryBudget(torch.device("cpu"), run), nullcontext)
    return evaluation.measure(variant)["evaluation"]


def test_every_scheme_is_measured(reference: Path) -> None:
    rows = json.loads((reference / "results.json").read_text())["original"]
    assert {row["name"] for row in rows} == set(SCHEMES)


@pytest.mark.parametrize("name", ["llama-w3a16", "llama-outliers-w3a16", "opt-outliers-w3a16"])
def test_full_precision(reference: Path, tmp_path: Path, name: str) -> None:
    expected = row_of(reference, name)["full_precision"]
    measured = measure(reference, name, "full_precision", tmp_path)
    assert measured == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_round_to_nearest(reference: Path, tmp_path: Path, name: str) -> None:
    """The original's ranges of activations need not contain zero; ours do, hence the width."""
    expected = row_of(reference, name)["round_to_nearest"]
    measured = measure(reference, name, "round_to_nearest", tmp_path)
    assert measured == pytest.approx(expected, rel=2e-2 if name in ACTIVATIONS else 1e-3)


def test_published_factors_reproduce_their_model(reference: Path, tmp_path: Path) -> None:
    """What the original learned, folded without an epoch, has the perplexity that the original measured."""
    model = OmniQuantModel(
        str(reference / "models" / "llama-outliers"),
        WeightSpec(bits=4, scale_dtype="float32"),  # it ran in float32 throughout
        ActivationSpec(bits=4),
        transform=TransformSpec(),
        parameters=str(reference / "omni_parameters" / "llama-outliers-w4a4.pth"),
    )
    folder = RunFolder(tmp_path)
    for index in range(len(model.source)):
        tensors = model.source.block_tensors(index)
        folder.save_factors(index, model.block(index, tensors, BlockCall(), {}).factors.export())
    tokens = {"evaluation": torch.from_numpy(np.load(reference / "evaluation.npy")).long()}
    room = MemoryBudget(torch.device("cpu"), tmp_path)
    measured = Evaluation(model, folder, tokens, room, nullcontext).measure("quantized")
    expected = row_of(reference, "llama-outliers-w4a4")["perplexity"]
    assert measured["evaluation"] == pytest.approx(expected, rel=1e-3)
