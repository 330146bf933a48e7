"""Settings are refused where they enter, by their key."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.spec import (
    ActivationSpec,
    ClippingSpec,
    RotationSpec,
    ScheduleSpec,
    Scheme,
    TransformSpec,
    WeightSpec,
    WindowSpec,
)


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
        (WeightSpec, {"bits": 9}, "model.weights.bits"),
        (ClippingSpec, {"lr": 1.5}, "model.clipping.lr"),
        (ClippingSpec, {"initial": math.inf}, "model.clipping.initial"),
        (RotationSpec, {"seed": -1}, "model.rotation.seed"),
        (ScheduleSpec, {"warmup": 1.0}, "model.learning.schedule.warmup"),
        (ScheduleSpec, {"warmup": -0.1}, "model.learning.schedule.warmup"),
        (ScheduleSpec, {"warmup": math.nan}, "model.learning.schedule.warmup"),
        (WindowSpec, {"blocks": 0}, "model.objective.window.blocks"),
        (WindowSpec, {"stride": 0}, "model.objective.window.stride"),
        (WindowSpec, {"stride": 3, "blocks": 2}, "model.objective.window.stride"),
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
        (Scheme(WeightSpec(2, bits_of={"up_proj": 3, "down_proj": 4})), "w2a16-down_proj4-up_proj3"),
    ],
)
def test_scheme_names(scheme: Scheme, name: str) -> None:
    assert scheme.name == name


class TestWidthsByLinear:
    SPEC = WeightSpec(3, 16, symmetric=True, scale_dtype="bfloat16", bits_of={"down_proj": 5, "w2": 8})

    @pytest.mark.parametrize(
        ("name", "bits"),
        [
            ("mlp.down_proj", 5),
            ("mlp.experts.11.w2", 8),
            ("down_proj", 5),
            ("mlp.up_proj", 3),
            ("down_proj.up_proj", 3),  # the last part of the name decides, all of it
            ("mlp.shared_down_proj", 3),
        ],
    )
    def test_the_last_part_of_the_name_decides(self, name: str, bits: int) -> None:
        assert self.SPEC.of_linear(name) == WeightSpec(bits, 16, symmetric=True, scale_dtype="bfloat16")

    @pytest.mark.parametrize("bits", [1, 9])
    def test_a_wrong_width_is_refused_by_its_key(self, bits: int) -> None:
        with pytest.raises(ConfigurationError, match=rf"^model\.weights\.bits_of\.down_proj: {bits} "):
            WeightSpec(3, bits_of={"up_proj": 4, "down_proj": bits})


class TestSchedule:
    """What the rates are multiplied with, over the steps of a block."""

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            (ScheduleSpec(), [1, 1, 1, 1]),
            (ScheduleSpec(decay="linear"), [1, 3 / 4, 2 / 4, 1 / 4]),
            (ScheduleSpec(decay="cosine"), [1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]),
            (ScheduleSpec(0.5), [1 / 3, 2 / 3, 1, 1]),
            (ScheduleSpec(0.5, "linear"), [1 / 3, 2 / 3, 1, 1 / 2]),
            (ScheduleSpec(0.25, "linear"), [1 / 2, 1, 2 / 3, 1 / 3]),
            (ScheduleSpec(0.25, "cosine"), [1 / 2, 1, 3 / 4, 1 / 4]),
            (ScheduleSpec(0.75, "cosine"), [1 / 4, 2 / 4, 3 / 4, 1]),
            (ScheduleSpec(0.6, "linear"), [1 / 3, 2 / 3, 1, 1 - 0.6 / 1.6]),  # 2.4 steps of warm-up
        ],
    )
    def test_values(self, schedule: ScheduleSpec, expected: list[float]) -> None:
        assert [schedule.factor(step, 4) for step in range(4)] == pytest.approx(expected)

    @given(
        warmup=st.floats(0, 0.99),
        decay=st.sampled_from(["none", "linear", "cosine"]),
        steps=st.integers(1, 300),
    )
    def test_rates_rise_to_one_and_fall_towards_zero(self, warmup: float, decay: Any, steps: int) -> None:
        schedule = ScheduleSpec(warmup, decay)
        factors = [schedule.factor(step, steps) for step in range(steps + 1)]
        learning = factors[:-1]  # the last is what a scheduler asks for behind the last step
        top = learning.index(max(learning))
        assert top <= warmup * steps + 1
        assert learning[: top + 1] == sorted(learning[: top + 1])
        assert learning[top:] == sorted(learning[top:], reverse=True)
        assert all(0 < factor <= 1 for factor in learning)
        assert learning[0] == pytest.approx(1 if warmup * steps == 0 else 1 / (math.floor(warmup * steps) + 1))
        if (1 - warmup) * steps >= 1:
            assert max(learning) > 0.5
            assert factors[-1] == pytest.approx(1 if decay == "none" else 0, abs=1e-6)

    @pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
    def test_constant_is_what_changes_nothing(self, decay: Any) -> None:
        assert ScheduleSpec(0.0, decay).is_constant == (decay == "none")
        assert not ScheduleSpec(0.1, decay).is_constant
