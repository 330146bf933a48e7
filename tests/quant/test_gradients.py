"""Gradients of fake quantization.

With every round replaced by the identity the functions are smooth almost everywhere and their straight-through
gradients are true gradients, which finite differences can check. With rounding, they are compared to autograd on the
formula written with detached residuals.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniquant_pl.quant import WeightQuantizer, dynamic_fake_quantize, fake_quantize
from omniquant_pl.quant.affine import to_rows
from omniquant_pl.quant.clipped import clipped_fake_quantize
from omniquant_pl.spec import ClippingSpec, Scheme, WeightSpec


@pytest.fixture
def rounding_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "round", lambda value: value.clone())
    monkeypatch.setattr(torch.Tensor, "round", lambda value: value.clone())
    monkeypatch.setattr(torch.Tensor, "round_", lambda value: value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("rounding_off")
@pytest.mark.parametrize(("lowest", "highest"), [(0, 15), (-8, 7), (0, 3)])
def test_fake_quantize_gradcheck(lowest: int, highest: int) -> None:
    rows = random(4, 9).requires_grad_()
    scale = (0.1 + random(4, 1, seed=1).abs()).requires_grad_()
    zero_point = random(4, 1, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *arguments: fake_quantize(*arguments, lowest, highest), (rows, scale, zero_point)
    )


@pytest.mark.usefixtures("rounding_off")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 5])
def test_clipping_gradcheck(symmetric: bool, group_size: int | None) -> None:
    spec = WeightSpec(3, group_size, symmetric)
    quantizer = WeightQuantizer(spec, (4, 11), ClippingSpec(initial=0.5)).double()
    weight = random(4, 11).requires_grad_()
    names = [name for name, _ in quantizer.named_parameters()]

    def function(weight: Tensor, *factors: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(quantizer, dict(zip(names, factors, strict=True)), (weight,))
        return result

    factors = [parameter.detach().clone().requires_grad_() for parameter in quantizer.parameters()]
    assert torch.autograd.gradcheck(function, (weight, *factors))


def _straight_through(value: Tensor) -> Tensor:
    return value + (value.round() - value).detach()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_gradient_with_rounding(bits: int) -> None:
    quantizer = WeightQuantizer(WeightSpec(bits), (6, 40), ClippingSpec(initial=1.0)).double()
    weight = random(6, 40).requires_grad_()
    upstream = random(6, 40, seed=3)
    quantizer(weight).backward(upstream)
    assert quantizer.upper is not None
    assert quantizer.lower is not None
    upper, lower = (p.detach().clone().requires_grad_() for p in (quantizer.upper, quantizer.lower))
    reference_weight = weight.detach().clone().requires_grad_()
    top = 2**bits - 1
    high = torch.sigmoid(upper) * reference_weight.amax(1, keepdim=True)
    low = torch.sigmoid(lower) * reference_weight.amin(1, keepdim=True)
    scale = (high - low) / top
    zero = _straight_through(-low / scale)
    codes = (_straight_through(reference_weight / scale) + zero).clamp(0, top)
    ((codes - zero) * scale).backward(upstream)
    for found, expected in (
        (quantizer.upper.grad, upper.grad),
        (quantizer.lower.grad, lower.grad),
        (weight.grad, reference_weight.grad),
    ):
        assert found is not None
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_constant_range_changes_nothing() -> None:
    quantizer = WeightQuantizer(WeightSpec(4, 16), (6, 40), ClippingSpec()).double()
    weight = random(6, 40)
    assert torch.equal(quantizer(weight), quantizer(weight, quantizer.range_of(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_quantization_keeps_shape_and_dtype(dtype: torch.dtype) -> None:
    values = random(2, 3, 5, 8).to(dtype)
    result = dynamic_fake_quantize(values, 4)
    assert result.shape == values.shape
    assert result.dtype == dtype
    levels = {len(row.unique()) for row in dynamic_fake_quantize(random(30, 100), 2)}
    assert max(levels) <= 4


@pytest.mark.parametrize("magnitude", [1e-30, 1e-24, 1e-6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tiny_weights_have_finite_gradients(magnitude: float, symmetric: bool) -> None:
    quantizer = WeightQuantizer(WeightSpec(4, None, symmetric), (3, 8), ClippingSpec())
    weight = (magnitude * random(3, 8).float()).requires_grad_()
    quantizer(weight).sum().backward()
    for tensor in (weight, *quantizer.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())


def _written_out(
    weight: Tensor,
    spec: WeightSpec,
    upper: Tensor | None,
    lower: Tensor | None,
    offset: Tensor,
    is_range_constant: bool = False,
) -> Tensor:
    """Straight-through fake quantization with an offset before the rounding, one group of input channels at a time."""
    size, parts = spec.group_size or weight.shape[1], []
    for group, start in enumerate(range(0, weight.shape[1], size)):
        part, added = weight[:, start : start + size], offset[:, start : start + size]
        extremes = part.detach() if is_range_constant else part
        high, low = extremes.amax(1).clamp(min=0)[:, None], extremes.amin(1).clamp(max=0)[:, None]
        gamma = 1.0 if upper is None else torch.sigmoid(upper[:, group, None])
        beta = gamma if lower is None else torch.sigmoid(lower[:, group, None])
        if spec.symmetric:
            top, bottom = 2 ** (spec.bits - 1) - 1, -(2 ** (spec.bits - 1))
            scale, zero = gamma * torch.maximum(high, -low) / top, torch.zeros_like(high)
        else:
            top, bottom = 2**spec.bits - 1, 0
            scale = (gamma * high - beta * low) / top
            zero = _straight_through(-beta * low / scale)
        codes = (_straight_through(part / scale + added) + zero).clamp(bottom, top)
        parts.append((codes - zero) * scale)
    return torch.cat(parts, 1)


def rounding_quantizer(spec: WeightSpec, shape: tuple[int, int], clips: bool) -> WeightQuantizer:
    """One in float64 whose factors are random: offsets within half a code, clipping of all strengths."""
    quantizer = WeightQuantizer(spec, shape, ClippingSpec() if clips else None, rounds=True).double()
    with torch.no_grad():
        for seed, parameter in enumerate(quantizer.parameters(), start=10):
            parameter.copy_(random(*parameter.shape, seed=seed))
        assert quantizer.offset is not None
        quantizer.offset.copy_(torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) - 0.5)
    return quantizer


SCHEMES = [
    WeightSpec(2),
    WeightSpec(4),
    WeightSpec(3, 8),
    WeightSpec(3, 9),  # 23 channels: the last group is shorter
    WeightSpec(3, symmetric=True),
    WeightSpec(4, 9, symmetric=True),
]


@pytest.mark.parametrize("is_range_constant", [False, True], ids=["range", "constant-range"])
@pytest.mark.parametrize("clips", [False, True], ids=["full", "clipped"])
@pytest.mark.parametrize("spec", SCHEMES, ids=lambda spec: Scheme(spec).name)
def test_offset_gradients_with_rounding(spec: WeightSpec, clips: bool, is_range_constant: bool) -> None:
    quantizer = rounding_quantizer(spec, (5, 23), clips)
    weight, upstream = random(5, 23).requires_grad_(), random(5, 23, seed=3)
    result = quantizer(weight, quantizer.range_of(weight.detach()) if is_range_constant else None)
    result.backward(upstream)
    mine = {"weight": weight, **dict(quantizer.named_parameters())}
    theirs = {name: tensor.detach().clone().requires_grad_() for name, tensor in mine.items()}
    reference = _written_out(
        theirs["weight"], spec, theirs.get("upper"), theirs.get("lower"), theirs["offset"], is_range_constant
    )
    reference.backward(upstream)
    torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)
    assert "offset" in mine
    assert ("upper" in mine) == clips
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)
    moving = theirs["offset"].grad
    assert moving is not None
    assert bool((moving != 0).any())
    assert bool((moving == 0).any()) or not clips  # codes beyond the clipped range do not move


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_function_of_rows_has_the_gradients_of_the_formula(symmetric: bool) -> None:
    rows, upper, lower, offset = (
        tensor.requires_grad_()
        for tensor in (random(7, 12), random(7, 1, seed=1), random(7, 1, seed=2), random(7, 12, seed=4) / 4)
    )
    arguments = [rows, upper, offset] if symmetric else [rows, upper, lower, offset]
    upstream, end = random(7, 12, seed=5), None if symmetric else lower
    found = clipped_fake_quantize(rows, upper, end, None, 3, symmetric, 2**-14, offset)
    expected = _written_out(rows, WeightSpec(3, symmetric=symmetric), upper, end, offset)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(result, arguments, upstream) for result in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("spec", SCHEMES, ids=lambda spec: Scheme(spec).name)
def test_an_offset_of_zero_changes_nothing(spec: WeightSpec, clips: bool) -> None:
    with_offset = rounding_quantizer(spec, (5, 23), clips)
    without = WeightQuantizer(spec, (5, 23), ClippingSpec() if clips else None).double()
    assert with_offset.offset is not None
    with torch.no_grad():
        with_offset.offset.zero_()
        for name, parameter in without.named_parameters():
            parameter.copy_(with_offset.get_parameter(name))
    results, gradients = [], []
    for quantizer in (with_offset, without):
        weight = random(5, 23).requires_grad_()
        results.append(quantizer(weight))
        results[-1].backward(random(5, 23, seed=3))
        ends = [parameter.grad for name, parameter in quantizer.named_parameters() if name != "offset"]
        gradients.append([weight.grad, *ends])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    stored = [quantizer.float().quantize(random(5, 23).float()).codes for quantizer in (with_offset, without)]
    assert torch.equal(*stored)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda spec: Scheme(spec).name)
def test_folding_learned_rounding_gives_what_was_trained(scheme: WeightSpec, clips: bool) -> None:
    """Exactly, if the scale is stored as it was trained; and codes are those of the formula with the stored one."""
    spec = WeightSpec(scheme.bits, scheme.group_size, scheme.symmetric, "float32")
    quantizer, weight = rounding_quantizer(spec, (5, 23), clips).float(), random(5, 23).float()
    folded = quantizer.quantize(weight)
    torch.testing.assert_close(folded.dequantize(), quantizer(weight).detach(), rtol=1e-6, atol=1e-6)
    half = rounding_quantizer(scheme, (5, 23), clips).float()
    assert half.offset is not None
    stored = half.quantize(weight)
    scale, zero = (
        torch.zeros_like(weight) if part is None else part.float().repeat_interleave(stored.group_size, 1)[:, :23]
        for part in (stored.scale, stored.zero_point)
    )
    lowest, highest = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if spec.symmetric else (0, 2**spec.bits - 1)
    exact = weight.double() / scale.double() + half.offset.double()
    expected = (exact.round() + zero).clamp(lowest, highest)
    decided = ((exact - exact.floor()) - 0.5).abs() > 1e-5
    assert decided.float().mean() > 0.9
    assert torch.equal(stored.codes[decided].double(), expected[decided])
    nearest = ((weight / scale).round() + zero).clamp(lowest, highest)
    assert (stored.codes - nearest).abs().max() == 1  # half a code away, so at most the next one
    assert stored.codes.min() >= lowest
    assert stored.codes.max() <= highest


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_stay_within_their_limits_at_the_largest_offsets(bits: int, symmetric: bool) -> None:
    spec = WeightSpec(bits, 7, symmetric)
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    for sign in (-0.5, 0.5):
        quantizer = WeightQuantizer(spec, (40, 30), ClippingSpec(initial=-1.0), rounds=True)
        assert quantizer.offset is not None
        with torch.no_grad():
            quantizer.offset.fill_(sign)
        codes = quantizer.quantize(random(40, 30).float()).codes.int()
        assert (int(codes.min()), int(codes.max())) == (lowest, highest)
        levels = to_rows(quantizer(random(40, 30).float()).detach(), 7)
        assert max(len(row.unique()) for row in levels) <= 2**bits + 1  # and the zeros of a padded group


def test_projection_keeps_offsets_within_half_a_code_and_leaves_clipping() -> None:
    quantizer = WeightQuantizer(WeightSpec(3), (2, 3), ClippingSpec(initial=7.0), rounds=True)
    assert quantizer.offset is not None
    with torch.no_grad():
        quantizer.offset.copy_(torch.tensor([[-3.0, -0.5, -0.25], [0.0, 0.4375, 0.75]]))
    quantizer.project()
    assert quantizer.offset.tolist() == [[-0.5, -0.5, -0.25], [0.0, 0.4375, 0.5]]
    assert all(bool((end == 7).all()) for end in (quantizer.upper, quantizer.lower) if end is not None)
    assert quantizer.offset.requires_grad
