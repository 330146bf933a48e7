"""GPTQ against the recursion of its paper in float64, and against rounding to nearest."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniquant_pl.quant import QuantizedWeight, WeightQuantizer
from omniquant_pl.quant.gptq import gptq_codes
from omniquant_pl.spec import ClippingSpec, WeightSpec


def correlated_inputs(tokens: int, channels: int, seed: int) -> Tensor:
    """Inputs whose channels are correlated and of different power."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(channels) + torch.randn(channels, channels, generator=generator) / channels**0.5
    power = torch.randn(channels, generator=generator).exp()
    return torch.randn(tokens, channels, generator=generator) @ mixing * power


def random_weight(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded_to_nearest(weight: Tensor, spec: WeightSpec, clipping: ClippingSpec | None = None) -> QuantizedWeight:
    return WeightQuantizer(spec, (weight.shape[0], weight.shape[1]), clipping).quantize(weight)


def reference_codes(
    weight: Tensor, moment: Tensor, grid: QuantizedWeight, bits: int, damping: float, activation_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The update of Optimal Brain Quantization, the inverse of the remaining Hessian computed again at each step.

    Returns the codes, and per row the least distance that a value had from a tie in rounding.
    """
    values, hessian = weight.double().numpy().copy(), moment.double().numpy().copy()
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    power = np.diag(moment.numpy())
    remaining = list(np.argsort(-power, kind="stable")) if activation_order else list(range(len(hessian)))
    symmetric = grid.zero_point is None
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    codes, margin = np.empty_like(values), np.full(len(values), np.inf)
    while remaining:
        inverse = np.linalg.inv(hessian[np.ix_(remaining, remaining)])
        column, group = remaining[0], remaining[0] // grid.group_size
        scale = grid.scale[:, group].double().numpy()
        zero = 0.0 if grid.zero_point is None else grid.zero_point[:, group].double().numpy()
        ratio = values[:, column] / scale
        codes[:, column] = np.clip(np.round(ratio) + zero, lowest, highest)
        margin = np.minimum(margin, np.abs(np.abs(ratio - np.round(ratio)) - 0.5))
        error = values[:, column] - (codes[:, column] - zero) * scale
        values[:, remaining] -= np.outer(error / inverse[0, 0], inverse[0])
        remaining.pop(0)
    return codes, margin


def output_error(weight: Tensor, quantized: QuantizedWeight, inputs: Tensor) -> float:
    return float(((weight - quantized.dequantize()).double() @ inputs.double().T).square().sum())


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 5, 8]),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 30)),
    tokens=st.integers(1, 60),
    block_size=st.sampled_from([1, 4, 128]),
    activation_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_codes_are_those_of_the_recursion_with_the_inverse_hessian(
    bits: int,
    group: int | None,
    symmetric: bool,
    shape: tuple[int, int],
    tokens: int,
    block_size: int,
    activation_order: bool,
    seed: int,
) -> None:
    weight, inputs = random_weight(shape, seed), correlated_inputs(tokens, shape[1], seed)
    moment = inputs.T @ inputs
    nearest = rounded_to_nearest(weight, WeightSpec(bits, group, symmetric))
    found = gptq_codes(weight, moment, nearest, bits, block_size=block_size, activation_order=activation_order)
    expected, margin = reference_codes(weight, moment, nearest, bits, 0.01, activation_order)
    decided = margin > 1e-3  # elsewhere float32 may round the other way, and every later channel follows
    assert found.dtype == (torch.int8 if symmetric else torch.uint8)
    assert np.array_equal(found.numpy()[decided], expected[decided])


def test_a_larger_weight_follows_the_recursion_too() -> None:
    weight, inputs = random_weight((8, 90), 0), correlated_inputs(400, 90, 0)
    nearest = rounded_to_nearest(weight, WeightSpec(4, 32), ClippingSpec(initial=2.0))
    found = gptq_codes(weight, inputs.T @ inputs, nearest, 4, block_size=16)
    expected, margin = reference_codes(weight, inputs.T @ inputs, nearest, 4, 0.01, activation_order=True)
    assert (margin > 1e-4).sum() >= 6
    assert np.array_equal(found.numpy()[margin > 1e-4], expected[margin > 1e-4])


@pytest.mark.parametrize("initial", [None, 0.0])
@pytest.mark.parametrize("spec", [WeightSpec(2, 24), WeightSpec(3, None, symmetric=True), WeightSpec(4, 20)])
def test_the_output_error_is_well_below_that_of_nearest(spec: WeightSpec, initial: float | None) -> None:
    clipping = None if initial is None else ClippingSpec(initial=initial)
    for seed in range(10):
        weight, inputs = random_weight((32, 64), seed), correlated_inputs(300, 64, seed)
        nearest = rounded_to_nearest(weight, spec, clipping)
        codes = gptq_codes(weight, inputs.T @ inputs, nearest, spec.bits)
        found = output_error(weight, replace(nearest, codes=codes), inputs)
        assert found < 0.9 * output_error(weight, nearest, inputs)


@settings(max_examples=30)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 4, 7]),
    symmetric=st.booleans(),
    power=st.floats(1e-6, 1e6),
    seed=st.integers(0, 99),
)
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(
    bits: int, group: int | None, symmetric: bool, power: float, seed: int
) -> None:
    weight = random_weight((5, 18), seed)
    nearest = rounded_to_nearest(weight, WeightSpec(bits, group, symmetric))
    assert torch.equal(gptq_codes(weight, power * torch.eye(18), nearest, bits), nearest.codes)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_stay_within_their_limits_where_errors_pile_up(bits: int, symmetric: bool) -> None:
    inputs = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).expand(100, 40)  # rank one
    weight = random_weight((16, 40), 1)
    nearest = rounded_to_nearest(weight, WeightSpec(bits, 16, symmetric), ClippingSpec(initial=-2.0))
    codes = gptq_codes(weight, inputs.T @ inputs, nearest, bits).int()
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert int(codes.min()) == lowest
    assert int(codes.max()) == highest


def test_fewer_tokens_than_channels_are_enough() -> None:
    weight, inputs = random_weight((16, 64), 2), correlated_inputs(10, 64, 2)
    nearest = rounded_to_nearest(weight, WeightSpec(4))
    codes = gptq_codes(weight, inputs.T @ inputs, nearest, 4)
    assert output_error(weight, replace(nearest, codes=codes), inputs) < 0.5 * output_error(weight, nearest, inputs)


def test_a_dead_channel_is_rounded_to_nearest_and_disturbs_no_other() -> None:
    weight, inputs = random_weight((12, 20), 3), correlated_inputs(200, 20, 3)
    inputs[:, 7] = 0
    alive = [channel for channel in range(20) if channel != 7]
    scale, zero_point = torch.full((12, 1), 0.25), torch.full((12, 1), 8, dtype=torch.uint8)
    nearest = QuantizedWeight((weight / 0.25 + 8).round().clamp(0, 15).to(torch.uint8), scale, zero_point, 20)
    codes = gptq_codes(weight, inputs.T @ inputs, nearest, 4)
    others = replace(nearest, codes=nearest.codes[:, alive])
    moment = inputs[:, alive].T @ inputs[:, alive]
    # The mean of the diagonal is over one channel less.
    expected = gptq_codes(weight[:, alive], moment, others, 4, damping=0.01 * 19 / 20)
    assert torch.equal(codes[:, 7], nearest.codes[:, 7])
    assert torch.equal(codes[:, alive], expected)
    assert not torch.equal(codes, nearest.codes)


def test_codes_come_back_in_the_order_of_the_weight() -> None:
    weight, inputs = random_weight((6, 24), 4), correlated_inputs(200, 24, 4)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    nearest = rounded_to_nearest(weight, WeightSpec(3))
    nearest_shuffled = rounded_to_nearest(weight[:, shuffled], WeightSpec(3))
    codes = gptq_codes(weight, inputs.T @ inputs, nearest, 3)
    inputs = inputs[:, shuffled]
    assert torch.equal(gptq_codes(weight[:, shuffled], inputs.T @ inputs, nearest_shuffled, 3), codes[:, shuffled])


def test_silent_inputs_keep_the_nearest_codes_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_weight((4, 8), 6)
    nearest = rounded_to_nearest(weight, WeightSpec(4))
    assert torch.equal(gptq_codes(weight, torch.zeros(8, 8), nearest, 4), nearest.codes)
    assert not caplog.records


def test_the_damping_is_raised_where_the_moment_is_slightly_indefinite(caplog: pytest.LogCaptureFixture) -> None:
    moment = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # eigenvalues 2.05 and -0.05
    weight = random_weight((30, 2), 7)
    nearest = rounded_to_nearest(weight, WeightSpec(2))
    codes = gptq_codes(weight, moment, nearest, 2, damping=0.01)
    expected, margin = reference_codes(weight, moment, nearest, 2, 0.1, activation_order=True)
    assert np.array_equal(codes.numpy()[margin > 1e-4], expected[margin > 1e-4])
    assert not torch.equal(codes, nearest.codes)
    assert not caplog.records


@pytest.mark.parametrize(
    "moment",
    [[[1.0, 5.0], [5.0, 1.0]], [[1.0, np.nan], [np.nan, 1.0]], [[1.0, np.inf], [np.inf, 1.0]], [[np.inf, 0], [0, 1.0]]],
    ids=["indefinite", "nan", "infinite", "infinite power"],
)
def test_a_hopeless_moment_keeps_the_nearest_codes_and_says_so(
    moment: list[list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    weight = random_weight((3, 2), 8)
    nearest = rounded_to_nearest(weight, WeightSpec(4))
    with caplog.at_level(logging.WARNING):
        codes = gptq_codes(weight, torch.tensor(moment), nearest, 4)
    assert torch.equal(codes, nearest.codes)
    assert "not positive definite" in caplog.text
    assert "[3, 2]" in caplog.text


def test_arguments_are_left_as_they_were() -> None:
    weight, inputs = random_weight((4, 12), 9), correlated_inputs(50, 12, 9)
    moment = inputs.T @ inputs
    nearest = rounded_to_nearest(weight, WeightSpec(4))
    before = [tensor.clone() for tensor in (weight, moment, nearest.codes)]
    gptq_codes(weight, moment, nearest, 4)
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, moment, nearest.codes), strict=True))


@pytest.mark.parametrize("damping", [0.0, -0.01, float("nan")])
def test_the_damping_must_be_positive(damping: float) -> None:
    weight = random_weight((2, 2), 10)
    with pytest.raises(ValueError, match="damping"):
        gptq_codes(weight, torch.eye(2), rounded_to_nearest(weight, WeightSpec(4)), 4, damping=damping)
