"""What the methods set: the published settings, the presets, and nothing of the configuration that they start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from omniquant_pl.compare.recipes import RECIPES, Case, configuration
from omniquant_pl.spec import ActivationSpec, Scheme, WeightSpec

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def case(name: str, model_type: str = "llama") -> Case:
    """The scheme of a preset, as its file has it."""
    section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    activations = None if section["activations"] is None else ActivationSpec(**section["activations"])
    return Case(Scheme(WeightSpec(**section["weights"]), activations), model_type)


def settings(method: str, asked: Case) -> dict[str, Any]:
    found = RECIPES[method].settings(asked)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_paper_is_the_preset(name: str) -> None:
    preset = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert settings("paper", case(name)) == {
        "model.clipping": preset["model"]["clipping"],
        "model.transform": preset["model"]["transform"],
        "model.objective": preset["model"]["objective"],
        "trainer.max_epochs": preset["trainer"]["max_epochs"],
    }


def test_paper_transforms_weights_alone_in_opt() -> None:
    assert settings("paper", case("w3a16", "opt"))["model.transform"] == {"lr": 5e-3, "alpha": 0.5}


def test_best_is_its_preset() -> None:
    preset = yaml.safe_load((CONFIGS / "best" / "w3a16.yaml").read_text())
    found = settings("best", case("w3a16"))
    assert found["model.rounding"]["method"] == preset["model"]["rounding"]["method"] == "learned"
    assert found["data.batch_size"] == preset["data"]["batch_size"]
    assert found["trainer.max_epochs"] == preset["trainer"]["max_epochs"]
    assert "trainer.precision" in {f"trainer.{key}" for key in preset["trainer"]} - found.keys()
    assert {"model.path", "model.weights", "data.dataset", "trainer.default_root_dir"}.isdisjoint(found)


def test_a_scheme_without_a_best_preset_says_so() -> None:
    assert RECIPES["best"].settings(Case(Scheme(WeightSpec(5)), "llama")) == (
        "there is no preset configs/best/w5a16.yaml"
    )


def test_awq_is_for_weights_alone() -> None:
    assert RECIPES["awq"].settings(case("w4a4")) == "it is made for weights alone"


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "awq", "gptq"])
def test_baselines_learn_nothing(method: str) -> None:
    assert settings(method, case("w3a16"))["trainer.max_epochs"] == 0


def test_a_method_keeps_the_case_and_nothing_else() -> None:
    given = {
        "seed_everything": 7,
        "model": {
            **dict.fromkeys(("activation_dtype", "activation_budget", "trust_remote_code")),
            "path": "a/model",
            "weights": {"bits": 3},
            "activations": None,
            "rounding": "learned",
            "clipping": {"lr": 0.5},
        },
        "data": {"dataset": "c4", "samples": 4, "sequence_length": 8, "evaluation": ["c4"], "batch_size": 64},
        "trainer": {"accelerator": "cpu", "devices": 8, "max_epochs": 99, "precision": "bf16-mixed"},
        "numerics": {"retries": 0},
    }
    found = configuration(given, settings("rtn", case("w3a16")))
    assert found["seed_everything"] == 7
    assert (found["model"]["path"], found["model"]["weights"]) == ("a/model", {"bits": 3})
    assert found["model"]["clipping"] is None
    assert "rounding" not in found["model"]
    assert found["data"] == {"dataset": "c4", "samples": 4, "sequence_length": 8, "evaluation": ["c4"]}
    assert found["trainer"] == {"accelerator": "cpu", "precision": "bf16-mixed", "max_epochs": 0}
    assert given["trainer"]["max_epochs"] == 99
