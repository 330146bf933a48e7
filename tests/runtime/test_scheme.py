"""The scheme in config.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from omniquant_pl.runtime.scheme import describe_scheme, read_scheme
from omniquant_pl.spec import ActivationSpec, Scheme, WeightSpec

SCHEMES = [
    Scheme(WeightSpec()),
    Scheme(WeightSpec(2, 64, True, "bfloat16"), ActivationSpec(6, True)),
    Scheme(WeightSpec(7, 20, scale_dtype="float32", bits_of={"down_proj": 8}), ActivationSpec(4)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_json_and_back(scheme: Scheme) -> None:
    assert read_scheme(json.loads(json.dumps(describe_scheme(scheme)))) == scheme


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq', not 'omniquant'"),
        ({"version": 2}, "quantization_config.version is 2; this program reads 1"),
        ({"version": True}, "quantization_config.version is True"),
        ({"bits": 9}, "model.weights.bits: 9 is not a width"),
        ({"bits": "4"}, "quantization_config.bits is '4', not a whole number"),
        ({"bits": True}, "quantization_config.bits is True, not a whole number"),
        ({"bits": 4.0}, "quantization_config.bits is 4.0, not a whole number"),
        ({"group_size": 0}, "model.weights.group_size: 0 is neither null"),
        ({"group_size": [64]}, "quantization_config.group_size is [64], not a whole number"),
        ({"symmetric": 1}, "quantization_config.symmetric is 1, neither true nor false"),
        ({"scale_dtype": "int8"}, "quantization_config.scale_dtype is 'int8', none of float16"),
        ({"scale_dtype": ["float16"]}, "quantization_config.scale_dtype is ['float16']"),
        ({"bits_of": None}, "quantization_config.bits_of is None, not a mapping"),
        ({"bits_of": {"down_proj": "8"}}, "quantization_config.bits_of.down_proj is '8'"),
        ({"bits_of": {"down_proj": 1}}, "model.weights.bits_of.down_proj: 1 is not a width"),
        ({"activations": 4}, "quantization_config.activations is 4, not a mapping"),
        ({"activations": {"bits": 4}}, "quantization_config.activations has no symmetric"),
        ({"activations": {"bits": 16, "symmetric": False}}, "model.activations.bits: 16 is not a width"),
    ],
)
def test_what_no_scheme_has_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (what it says is compared)
        read_scheme(describe_scheme(SCHEMES[0]) | change)
    assert expected in str(caught.value)


@pytest.mark.parametrize("key", describe_scheme(SCHEMES[0]))
def test_every_key_is_needed(key: str) -> None:
    described = describe_scheme(SCHEMES[0])
    del described[key]
    with pytest.raises(ValueError, match=f"quantization_config has no {key}"):
        read_scheme(described)


def test_something_else_than_a_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization_config is None, not a mapping"):
        read_scheme(None)
