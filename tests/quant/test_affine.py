"""Affine quantization against a slow float64 reference."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniquant_pl.quant import QuantizedWeight, WeightQuantizer
from omniquant_pl.quant.affine import from_rows, row_range, scale_and_zero_point, to_rows
from omniquant_pl.quant.storage import bits_per_weight, stored_bits
from omniquant_pl.spec import ClippingSpec, WeightSpec


def reference_round_trip(
    weight: np.ndarray,
    bits: int,
    group: int,
    symmetric: bool,
    gamma: float = 1.0,
    beta: float = 1.0,
) -> np.ndarray:
    """The formula of the paper, one group at a time, in float64 with float16 scales."""
    result = np.empty_like(weight, dtype=np.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group].astype(np.float64)
            low, high = min(values.min(), 0.0) * beta, max(values.max(), 0.0) * gamma
            if symmetric:
                top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
                scale = max(-low, high) / top
            else:
                top, bottom = 2**bits - 1, 0
                scale = (high - low) / top
            scale = float(np.float16(max(scale, np.finfo(np.float16).tiny)))
            zero = 0.0 if symmetric else np.clip(np.round(-low / scale), bottom, top)
            codes = np.clip(np.round(values / scale) + zero, bottom, top)
            result[row, start : start + group] = (codes - zero) * scale
    return result


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 5, 8, 64]),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    seed=st.integers(0, 2**16),
)
def test_codes_follow_the_formula(
    bits: int, group: int | None, symmetric: bool, shape: tuple[int, int], seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(WeightSpec(bits, group, symmetric), shape, clipping=None)
    found = quantizer.quantize(weight)
    expected = reference_round_trip(weight.numpy(), bits, min(group or shape[1], shape[1]), symmetric)
    # float32 division may fall on the other side of a tie: at most one step, and rarely.
    steps = np.abs(found.dequantize().double().numpy() - expected)
    step_size = found.scale.double().repeat_interleave(found.group_size, 1)[:, : shape[1]].numpy()
    assert (steps <= step_size * 1.001).all()
    assert (steps > step_size * 0.001).sum() <= max(1, weight.numel() // 100)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), low=st.floats(-3, 3), width=st.floats(0, 4), seed=st.integers(0, 99))
def test_zero_point_stays_where_formats_can_store_it(bits: int, low: float, width: float, seed: int) -> None:
    weight = low + width * torch.rand(4, 16, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(WeightSpec(bits), (4, 16), ClippingSpec())
    found = quantizer.quantize(weight)
    assert found.zero_point is not None
    assert int(found.zero_point.max()) <= 2**bits - 1
    assert int(found.codes.max()) <= 2**bits - 1


def test_sigmoid_of_the_factors_is_the_share_of_the_range() -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(WeightSpec(4, 16), (3, 32), ClippingSpec())
    assert quantizer.upper is not None
    assert quantizer.lower is not None
    with torch.no_grad():
        quantizer.upper.fill_(0.3)
        quantizer.lower.fill_(-0.2)
    gamma, beta = (1 / (1 + np.exp(-value)) for value in (0.3, -0.2))
    expected = reference_round_trip(weight.numpy(), 4, 16, False, gamma, beta)
    assert np.allclose(quantizer.quantize(weight).dequantize().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_folding_reproduces_training_up_to_the_stored_scale(symmetric: bool) -> None:
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    quantizer = WeightQuantizer(WeightSpec(4, 16, symmetric), (8, 50), ClippingSpec())
    exactly = WeightQuantizer(WeightSpec(4, 16, symmetric, "float32"), (8, 50), ClippingSpec())
    trained = quantizer(weight)
    assert torch.allclose(trained, exactly.quantize(weight).dequantize(), atol=1e-6)
    stored = quantizer.quantize(weight)
    assert stored.scale.dtype == torch.float16
    assert (stored.dequantize() - trained).abs().max() < 2e-2


def test_dequantize_is_exact_in_the_stored_scale() -> None:
    codes = torch.tensor([[0, 3, 1]], dtype=torch.uint8)
    weight = QuantizedWeight(
        codes,
        torch.tensor([[0.5, 2.0]], dtype=torch.float16),
        torch.tensor([[1, 3]], dtype=torch.uint8),
        2,
    )
    assert weight.dequantize().tolist() == [[-0.5, 1.0, -4.0]]


def test_a_ragged_group_is_padded_without_changing_its_range() -> None:
    weight = torch.full((2, 5), 3.0)
    rows = to_rows(weight, 4)
    assert rows.shape == (4, 4)
    assert torch.equal(from_rows(rows, 2, 5), weight)
    low, high = row_range(rows)
    assert low.flatten().tolist() == [0.0] * 4
    assert high.flatten().tolist() == [3.0] * 4


@pytest.mark.parametrize("scale_dtype", [None, torch.float16])
def test_a_zero_group_has_a_normal_scale_while_learning_and_stored(scale_dtype: torch.dtype | None) -> None:
    zeros = torch.zeros(1, 1)
    scale, zero_point = scale_and_zero_point(zeros, zeros, 4, False, WeightSpec().smallest_scale, scale_dtype)
    assert float(scale) == pytest.approx(torch.finfo(torch.float16).tiny)
    assert float(zero_point) == 0.0


@pytest.mark.parametrize(("scale_dtype", "error"), [("float16", 1e-2), ("bfloat16", 4e-3), ("float32", 4e-3)])
@pytest.mark.parametrize("clipping", [None, ClippingSpec(initial=20.0)])
def test_small_weights_need_small_scales(
    scale_dtype: Literal["float16", "bfloat16", "float32"], error: float, clipping: ClippingSpec | None
) -> None:
    """Float16 has none for 8 bits of them; the others are as exact as for large ones, learned and stored."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) / 1000
    quantizer = WeightQuantizer(WeightSpec(8, scale_dtype=scale_dtype), (4, 64), clipping)
    for found in (quantizer(weight).detach(), quantizer.quantize(weight).dequantize()):
        relative = float((found - weight).norm() / weight.norm())
        assert error / 4 < relative < 2 * error
    zeros = torch.zeros(4, 64)
    quantizer(zeros).sum().backward() if clipping else None
    stored = quantizer.quantize(zeros)
    assert not stored.dequantize().any()
    assert stored.scale.unique().tolist() == [2.0**-14]  # which every format can hold
    assert all(bool(each.grad.isfinite().all()) for each in quantizer.parameters() if each.grad is not None)


def test_stored_bits_counts_codes_scales_and_zero_points() -> None:
    assert stored_bits(WeightSpec(4, 128), (10, 256)) == 10 * 256 * 4 + 20 * (16 + 4)
    assert stored_bits(WeightSpec(3, 100, symmetric=True), (1, 250)) == 750 + 3 * 16
    assert bits_per_weight([(WeightSpec(2, 64), (64, 128))]) == pytest.approx(2 + 18 / 64)
    mixed = [(WeightSpec(2, symmetric=True), (1, 16)), (WeightSpec(4, symmetric=True), (3, 16))]
    assert bits_per_weight(mixed) == pytest.approx((2 + 1 + 3 * (4 + 1)) / 4)
