"""Settings from Python arrive as they are given, or are refused by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omniquant_pl.api.fit import prepare_fit
from omniquant_pl.api.process import untouched_process
from omniquant_pl.api.settings import plain_settings
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.spec import WeightSpec


def parsed(settings: Mapping[str, Any], scheme: str = "w4a16g128") -> Any:
    with untouched_process():
        return prepare_fit(scheme, {"progress.quiet": True} | plain_settings(settings, False)).config["fit"]


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        *(("model.parameters", text, text) for text in ("no", "1e-3", "123", "true", "[a]", "{a: 1}", "a: b", "x #y")),
        *(("data.dataset", text, text) for text in ("no", "1e-3", "null", "~", "2024-01-01", "Grüße 😀", 'a "b"')),
        ("data.evaluation", ["no", "null", "1e-3"], ["no", "null", "1e-3"]),
        ("data.evaluation", ("c4", "ptb"), ["c4", "ptb"]),
        ("model.parameters", Path("a/b"), "a/b"),
        ("model.parameters", None, None),
        ("model.clipping", None, None),
        ("data.samples", np.int64(7), 7),
        ("data.samples", torch.tensor(7), 7),
        ("data.samples", "7", 7),
        ("model.clipping.lr", np.float64(1e-5), 1e-5),
        ("model.clipping.lr", 1e-5, 1e-5),
        ("model.objective.aug_loss", np.bool_(True), True),
        ("export.dtype", torch.bfloat16, "bfloat16"),
        ("model.weights.bits_of", {"q_proj": np.int32(2)}, {"q_proj": 2}),
        ("model.weights.bits_of.q_proj", 2, 2),
    ],
)
def test_values_arrive_as_they_are_given(key: str, given: Any, expected: Any) -> None:
    config, found = parsed({key: given}), None
    for name in key.split("."):
        config = found = config.get(name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    "settings",
    [
        {"model.weights.bits": 3},
        {"model.weights": {"bits": 3}},
        {"model": {"weights": {"bits": 3}}},
        {"model": {"weights.bits": 3}},
        {"model.weights": WeightSpec(bits=3, group_size=128)},
    ],
)
def test_nested_settings_change_no_others(settings: Mapping[str, Any]) -> None:
    weights = parsed(settings)["model"]["weights"]
    assert (weights["bits"], weights["group_size"]) == (3, 128)  # the latter is the preset's


def test_a_class_with_its_arguments() -> None:
    given = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "loss", "patience": 2}}
    callback = parsed({"trainer.callbacks": [given]})["trainer"]["callbacks"][0]
    assert (callback.class_path, callback.init_args.patience) == (given["class_path"], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "there is no setting bits; did you mean model.weights.bits or model.activations.bits"),
        ({"model.weigths.bits": 3}, "there is no setting model.weigths.bits; did you mean model.weights.bits"),
        ({"model": {"weigths": {"bits": 3}}}, "there is no setting model.weigths"),
        ({"model.weights.bits": "five"}, "model.weights.bits: five is not accepted; expected a whole number"),
        ({"model.weights.bits": 2.5}, "model.weights.bits: 2.5 is not accepted"),
        ({"model.weights.bits": True}, "model.weights.bits: True is not accepted"),
        ({"model.weights": 4}, "model.weights: 4 is not accepted for a section; expected its settings, such as bits"),
        ({"model": 4}, "model: 4 is not accepted for a section"),
        ({"model": None}, "model: null is not accepted for a section"),
        ({"data.samples": None}, "data.samples: null is not accepted"),
        ({"data.dataset": True}, "data.dataset: True is not accepted; expected a text"),
        ({"model.parameters": "null"}, "model.parameters: the text 'null' would be read as null; give None"),
        ({"trainer.devices": 2}, "trainer: 2 processes are asked for"),
        ({"trainer.callbacks": [object()]}, "trainer.callbacks: a object is no value of a configuration"),
        ({"data.dataset": "\ud83d"}, "data.dataset: half a surrogate pair stands as character 1"),
        ({3: 4}, "3 is no key; keys are texts"),
        ({"model": {3: 4}}, "3 in model is no key"),
        (["data.samples"], "a list is no mapping"),
        ("data.samples=3", "a str is no mapping"),
        ({"model.path": "x"}, "model.path: the model is the first argument"),
        ({"model": {"path": "x"}}, "model.path: the model is the first argument"),
        ({"trainer.default_root_dir": "x"}, "trainer.default_root_dir: give the folder as output"),
        ({"export.format": "gguf"}, "export.format: quantize.. loads the hf format"),
        ({"ckpt_path": "last"}, "ckpt_path: quantize.. starts a run of its own"),
        ({"data.samples": 3, "data": {"samples": 4}}, "data.samples: it is given twice, as 3 and as 4"),
        ({"model.activations": None, "model.activations.bits": 4}, "model.activations and model.activations.bits are"),
    ],
)
def test_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^settings: {message}") as caught:
        parsed(settings)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_file_that_is_the_scheme(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model:\n  weigths: {bits: 3}\n")
    with pytest.raises(ConfigurationError, match=rf"^scheme: {path}, line 2: there is no setting model.weigths"):
        parsed({}, str(path))
