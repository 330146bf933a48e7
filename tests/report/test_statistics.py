"""What is kept of a block, against transformers' own activations and the factors in the run folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Finished

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


@pytest.fixture(scope="module")
def kept(finished: Finished) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((finished.folder / "statistics").iterdir())]


@pytest.fixture(scope="module")
def magnitudes(finished: Finished, token_files: tuple[Path, Path]) -> dict[str, np.ndarray]:
    """Largest magnitude of every channel that a linear reads, by its name in the model."""
    model = AutoModelForCausalLM.from_pretrained(finished.model, dtype=torch.float32)
    found: dict[str, np.ndarray] = {}

    def record(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[name] = inputs[0].abs().flatten(0, -2).amax(0).numpy()

        return hook

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        model(torch.from_numpy(np.load(token_files[0])))
    return found


def test_every_block_has_its_file(kept: list[dict[str, Any]]) -> None:
    assert [each["index"] for each in kept] == [0, 1]
    for each in kept:
        assert len(each["epoch_losses"]) == 3
        assert all(loss > 0 for loss in each["epoch_losses"])
        assert each["peak_memory_bytes"]["host"] > 50e6


def test_linears_that_read_the_same_stand_together(kept: list[dict[str, Any]]) -> None:
    readers = [each["readers"] for each in kept[0]["inputs"]]
    assert readers == [QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize("index", [0, 1])
def test_magnitudes_before(kept: list[dict[str, Any]], magnitudes: dict[str, np.ndarray], index: int) -> None:
    for each in kept[index]["inputs"]:
        for reader in each["readers"]:
            expected = magnitudes[f"{index}.{reader}"]
            np.testing.assert_allclose(each["before"], expected, rtol=1e-4)
            lower_middle = np.sort(expected)[(len(expected) - 1) // 2]
            assert each["median_before"] == pytest.approx(lower_middle, rel=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_magnitudes_after(
    kept: list[dict[str, Any]], magnitudes: dict[str, np.ndarray], finished: Finished, index: int
) -> None:
    """Divided by the scales in the run folder; of two query heads that share one, each value head's is used twice."""
    factors = load_file(finished.folder / "blocks" / f"{index:05d}.safetensors")
    qkv, output, gate_up, down = kept[index]["inputs"]
    norm, mlp_norm = factors["input_layernorm.scale"].numpy(), factors["post_attention_layernorm.scale"].numpy()
    values = np.repeat(factors["self_attn.v_proj.scale"].numpy().reshape(2, 8), 2, axis=0).reshape(-1)
    for each, scale in ((qkv, norm), (output, values), (gate_up, mlp_norm)):
        expected = magnitudes[f"{index}.{each['readers'][0]}"] / np.abs(scale)
        np.testing.assert_allclose(each["after"], expected, rtol=1e-4)
    assert down["after"] is None  # no pair of the paper ends there


@pytest.mark.parametrize("index", [0, 1])
def test_clipping(kept: list[dict[str, Any]], finished: Finished, index: int) -> None:
    factors = load_file(finished.folder / "blocks" / f"{index:05d}.safetensors")
    names = {name.rpartition(".clip.")[0] for name in factors if ".clip." in name}
    assert set(kept[index]["clipping"]) == names
    for name in names:
        ends = np.concatenate([factors[f"{name}.clip.{end}"].double().numpy().ravel() for end in ("upper", "lower")])
        expected = np.quantile(1 / (1 + np.exp(-ends)), [0.05, 0.25, 0.5, 0.75, 0.95])
        np.testing.assert_allclose(kept[index]["clipping"][name], expected, rtol=1e-5)
