"""Searches against exhaustive ones in numpy, and against rounding to nearest."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniquant_pl.quant import WeightQuantizer, dynamic_fake_quantize
from omniquant_pl.quant.search import activation_aware_scales, best_scale, clipping_logit, search_clipping
from omniquant_pl.spec import ClippingSpec, WeightSpec


def with_outliers(tokens: int, channels: int, seed: int) -> Tensor:
    """Inputs of which every ninth channel is thirty times as large as the others."""
    inputs = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    inputs[:, ::9] *= 30
    return inputs


def random_weights(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def round_to_nearest(values: np.ndarray, bits: int, group: int, symmetric: bool, share: float = 1.0) -> np.ndarray:
    """Fake quantization in float64, one slice of ``group`` values at a time, over the last axis."""
    result = np.empty_like(values)
    for index in np.ndindex(values.shape[:-1]):
        for start in range(0, values.shape[-1], group):
            part = values[index][start : start + group]
            low, high = min(part.min(), 0.0) * share, max(part.max(), 0.0) * share
            if symmetric:
                scale, zero = max(-low, high) / (2 ** (bits - 1) - 1), 0.0
                lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            else:
                scale, lowest, highest = (high - low) / (2**bits - 1), 0, 2**bits - 1
            scale = max(scale, float(np.finfo(np.float16).tiny))
            if not symmetric:
                zero = np.round(-low / scale)
            result[index][start : start + group] = (
                np.clip(np.round(part / scale) + zero, lowest, highest) - zero
            ) * scale
    return result


def errors_of(
    scales: list[np.ndarray],
    weights: list[Tensor],
    inputs: Tensor,
    spec: WeightSpec,
    activation_bits: int | None,
) -> list[float]:
    """The output error of each scale, every product written out."""
    found = []
    X = inputs.double().numpy()
    for scale in scales:
        scaled = X / scale
        if activation_bits is not None:
            scaled = round_to_nearest(scaled, activation_bits, X.shape[1], symmetric=False)
        error = 0.0
        for weight in weights:
            W = weight.double().numpy()
            quantized = round_to_nearest(W * scale, spec.bits, spec.group_size or W.shape[1], spec.symmetric)
            error += float(np.square(np.einsum("ti,oi->to", scaled, quantized) - X @ W.T).sum())
        found.append(error)
    return found


def quantizers_of(spec: WeightSpec, weights: list[Tensor]) -> list[WeightQuantizer]:
    return [WeightQuantizer(spec, (weight.shape[0], weight.shape[1]), None) for weight in weights]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "spec", [WeightSpec(3, 16), WeightSpec(2), WeightSpec(4, 20, symmetric=True), WeightSpec(3, 7)]
)
def test_the_scale_is_the_best_of_awqs_grid(spec: WeightSpec, seed: int) -> None:
    inputs = with_outliers(60, 48, seed)
    weights = random_weights(seed, (12, 48), (5, 48))
    magnitude = inputs.abs().mean(0)
    candidates = activation_aware_scales(magnitude, points=10)
    found = best_scale(candidates, weights, inputs, quantizers_of(spec, weights))
    powers = [np.abs(inputs.double().numpy()).mean(0) ** (step / 10) for step in range(11)]
    scales = [power / np.sqrt(power.max() * power.min()) for power in powers]
    for candidate, scale in zip(candidates, scales, strict=True):
        assert np.allclose(candidate.numpy(), scale, rtol=1e-4)
    errors = errors_of(scales, weights, inputs, spec, None)
    assert errors[found] <= min(errors) * (1 + 1e-4)
    assert errors[found] < 0.8 * errors[0]  # 0 is rounding to nearest


@pytest.mark.parametrize("seed", range(4))
def test_the_migration_strength_is_the_best_where_inputs_are_quantized_too(seed: int) -> None:
    inputs = with_outliers(60, 36, seed)
    weights = random_weights(seed, (8, 36), (8, 36))
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    alphas = np.linspace(0, 1, 11)
    candidates = [torch.ones(36)] + [inputs.abs().amax(0) ** alpha / largest ** (1 - alpha) for alpha in alphas]
    spec = WeightSpec(4)
    found = best_scale(
        candidates, weights, inputs, quantizers_of(spec, weights), partial(dynamic_fake_quantize, bits=4)
    )
    errors = errors_of([scale.double().numpy() for scale in candidates], weights, inputs, spec, 4)
    assert errors[found] <= min(errors) * (1 + 1e-3)
    assert errors[found] < 0.5 * errors[0]


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(9, 6),
        torch.ones(9, 6),
        torch.randn(9, 1, generator=torch.Generator().manual_seed(0)),
        torch.randn(9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0, 2, 0, 1e9, 1e-9]),
        torch.full((1, 6), 1e-30),
    ],
    ids=["zeros", "constant", "one channel", "dead channels", "tiny"],
)
def test_scales_of_degenerate_inputs_are_finite_and_positive(inputs: Tensor) -> None:
    candidates = activation_aware_scales(inputs.abs().mean(0))
    assert len(candidates) == 21
    assert torch.equal(candidates[0], torch.ones(inputs.shape[1]))
    for candidate in candidates:
        assert candidate.isfinite().all()
        assert 0.99e-2 < float(candidate.min()) <= float(candidate.max()) < 1.01e2
    weights = random_weights(1, (4, inputs.shape[1]))
    spec = WeightSpec(4)
    assert 0 <= best_scale(candidates, weights, inputs, quantizers_of(spec, weights)) < 21
    shares = search_clipping(weights[0], inputs, WeightSpec(4, 4))
    assert shares.isfinite().all()
    assert (shares >= 0.5).all()
    assert (shares <= 1).all()
    assert bool(inputs.any()) or (shares == 1).all()


def test_equal_candidates_leave_the_first_and_infinite_errors_lose() -> None:
    weights, inputs = random_weights(2, (4, 8)), with_outliers(10, 8, 2)
    quantizers = quantizers_of(WeightSpec(4), weights)
    ones, broken = torch.ones(8), torch.full((8,), torch.nan)
    assert best_scale([ones, ones, ones], weights, inputs, quantizers) == 0
    assert best_scale([broken, ones, broken], weights, inputs, quantizers) == 1
    assert best_scale([broken, broken], weights, inputs, quantizers) == 0


@settings(max_examples=40)
@given(
    bits=st.integers(2, 5),
    group=st.sampled_from([3, 8, 20]),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    tokens=st.sampled_from([1, 4, 50]),
    seed=st.integers(0, 2**16),
)
def test_shares_are_the_best_for_the_outputs_of_each_group(
    bits: int, group: int, symmetric: bool, shape: tuple[int, int], tokens: int, seed: int
) -> None:
    (weight,), inputs = random_weights(seed, shape), with_outliers(tokens, shape[1], seed)
    shares = search_clipping(weight, inputs, WeightSpec(bits, group, symmetric), points=6, smallest=0.4)
    assert shares.shape == (shape[0], -(-shape[1] // group))
    grid = np.linspace(1, 0.4, 6)
    W, X = weight.double().numpy(), inputs.double().numpy()
    for row, column in np.ndindex(*shares.shape):
        part = slice(column * group, (column + 1) * group)
        values = W[row, part]
        errors = [
            float(np.square(X[:, part] @ (round_to_nearest(values, bits, group, symmetric, share) - values)).sum())
            for share in grid
        ]
        chosen = int(np.abs(grid - float(shares[row, column])).argmin())
        assert grid[chosen] == pytest.approx(float(shares[row, column]), abs=1e-6)
        assert errors[chosen] <= min(errors) * (1 + 1e-3) + 1e-9 * float(np.square(X[:, part] @ values).sum())


def test_clipping_lowers_the_output_error_of_a_weight_with_outliers() -> None:
    (weight,), inputs = random_weights(3, (16, 64)), torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 5] *= 4
    inputs[:, 5] *= 0.1
    plain, clipped = (WeightQuantizer(WeightSpec(3, 32), (16, 64), spec) for spec in (None, ClippingSpec()))
    shares = search_clipping(weight, inputs, WeightSpec(3, 32))
    assert clipped.upper is not None
    assert clipped.lower is not None
    with torch.no_grad():
        for factor in (clipped.upper, clipped.lower):
            factor.copy_(clipping_logit(shares))
    errors = [
        float(((quantizer.quantize(weight).dequantize() - weight) @ inputs.T).square().sum())
        for quantizer in (clipped, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_rows_are_searched_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,), inputs = random_weights(4, (13, 30)), with_outliers(40, 30, 4)
    whole = search_clipping(weight, inputs, WeightSpec(3, 8, symmetric=True))
    monkeypatch.setattr("omniquant_pl.quant.search._CHUNK", 90)
    assert torch.equal(search_clipping(weight, inputs, WeightSpec(3, 8, symmetric=True)), whole)
    assert len(whole.unique()) > 3


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_full_share_is_exactly_the_full_range(symmetric: bool) -> None:
    (weight,) = random_weights(5, (6, 40))
    spec = WeightSpec(3, 16, symmetric)
    plain, clipped = (WeightQuantizer(spec, (6, 40), clipping) for clipping in (None, ClippingSpec()))
    with torch.no_grad():
        for factor in clipped.parameters():
            factor.copy_(clipping_logit(torch.ones(6, 3)))
    assert torch.equal(clipped(weight), plain(weight))


@given(share=st.floats(0.01, 0.999))
def test_a_logit_gives_back_its_share(share: float) -> None:
    assert float(torch.sigmoid(clipping_logit(torch.tensor(share)))) == pytest.approx(share, abs=1e-6)


def test_logits_are_bounded_where_learning_goes_on() -> None:
    found = clipping_logit(torch.tensor([1.0, 0.999, 0.5, 0.0]), highest=4.0)
    assert found.tolist() == pytest.approx([4.0, 4.0, 0.0, -4.0])
