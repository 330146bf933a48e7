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
from omniquant_pl.spec import ClippingSpec, WeightSpec


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
