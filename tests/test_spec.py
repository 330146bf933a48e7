"""Settings are refused where they enter, by their key."""

from __future__ import annotations

from typing import Any

import pytest

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.spec import ActivationSpec, ClippingSpec, Scheme, TransformSpec, WeightSpec


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        (WeightSpec, {"bits": 1}, "model.weights.bits"),
        (WeightSpec, {"bits": 17}, "model.weights.bits"),
        (WeightSpec, {"group_size": 0}, "model.weights.group_size"),
        (ActivationSpec, {"bits": 16}, "model.activations.bits"),
        (ClippingSpec, {"lr": 0.0}, "model.clipping.lr"),
        (TransformSpec, {"lr": -1.0}, "model.transform.lr"),
        (TransformSpec, {"alpha": 1.5}, "model.transform.alpha"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(kind: type, values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}: {next(iter(values.values()))}"):
        kind(**values)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(WeightSpec(4), ActivationSpec(4)), "w4a4"),
        (Scheme(WeightSpec(3, 128)), "w3a16g128"),
        (Scheme(WeightSpec(2, 64, symmetric=True)), "w2a16g64sym"),
    ],
)
def test_scheme_names(scheme: Scheme, name: str) -> None:
    assert scheme.name == name
