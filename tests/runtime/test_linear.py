"""The packed linear, against the product with the dequantized weight."""

from __future__ import annotations

import pytest
import torch

from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.runtime import PackedLinear
from omniquant_pl.runtime.codec import encode, planes_of
from omniquant_pl.spec import ActivationSpec, WeightSpec

ROWS, COLUMNS = 24, 40


def random_linear(
    spec: WeightSpec, activations: ActivationSpec | None = None, has_bias: bool = False
) -> tuple[PackedLinear, torch.Tensor]:
    """A packed linear, and its weight ``[out, in]`` in float64."""
    generator = torch.Generator().manual_seed(spec.bits)
    linear = PackedLinear(COLUMNS, ROWS, spec, activations, has_bias)
    codes = torch.randint(0, 2**spec.bits, (ROWS, COLUMNS), generator=generator)
    linear.scale = 0.1 + torch.rand(linear.scale.shape, generator=generator).to(linear.scale.dtype)
    zeros = torch.full(linear.scale.shape, 2 ** (spec.bits - 1))
    if linear.zero_point is not None:
        zeros = torch.randint(0, 2**spec.bits, linear.scale.shape, generator=generator)
        linear.zero_point = zeros.to(torch.uint8)
    if linear.bias is not None:
        linear.bias = torch.randn(ROWS, generator=generator)
    stored = encode(QuantizedWeight(codes.to(torch.uint8), linear.scale, zeros.to(torch.uint8), 1), spec)
    linear.words = planes_of(stored["packed"], spec.bits, (ROWS, COLUMNS))
    group = torch.arange(COLUMNS) // linear.group_size
    return linear, (codes - zeros[:, group]).double() * linear.scale.double()[:, group]


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16, 13])
@pytest.mark.parametrize("symmetric", [False, True])
def test_product(bits: int, group_size: int | None, symmetric: bool) -> None:
    linear, weight = random_linear(WeightSpec(bits, group_size, symmetric))
    for hidden in (states(1, 1), states(2, 30)):
        expected = hidden.double() @ weight.T
        assert torch.allclose(linear(hidden).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_bias() -> None:
    linear, weight = random_linear(WeightSpec(4), has_bias=True)
    assert linear.bias is not None
    hidden = states(5)
    expected = hidden.double() @ weight.T + linear.bias.double()
    assert torch.allclose(linear(hidden).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_input_is_quantized_per_token(symmetric: bool) -> None:
    linear, weight = random_linear(WeightSpec(8), ActivationSpec(3, symmetric))
    hidden = states(6)
    rounded = torch.empty_like(hidden, dtype=torch.float64)
    for token, row in enumerate(hidden.double()):
        if symmetric:
            scale, zero, low, high = row.abs().max() / 3, torch.tensor(0.0), -4, 3
        else:
            scale, low, high = (row.max().clamp(min=0) - row.min().clamp(max=0)) / 7, 0, 7
            zero = (-row.min().clamp(max=0) / scale).round()
        rounded[token] = ((row / scale).round() + zero).clamp(low, high).sub(zero) * scale
    assert torch.allclose(linear(hidden).double(), rounded @ weight.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    linear, weight = random_linear(WeightSpec(4, 16), has_bias=True)
    assert linear.bias is not None
    linear.bias = linear.bias.to(dtype)
    hidden = states(3).to(dtype)
    output = linear(hidden)
    expected = hidden.double() @ weight.T + linear.bias.double()
    assert output.dtype == dtype
    assert (output.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("symmetric", [False, True])
def test_double_precision_is_exact(symmetric: bool) -> None:
    linear, weight = random_linear(WeightSpec(5, 16, symmetric))
    assert (linear.dequantize().double() - weight).abs().max() < 1e-6 * weight.abs().max()
    hidden = states(3).double()
    assert torch.allclose(linear(hidden), hidden @ linear.dequantize().double().T, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_input() -> None:
    linear, weight = random_linear(WeightSpec(3, 16))
    hidden = states(4).requires_grad_()
    linear(hidden).sum().backward()
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.double(), weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_takes_the_memory_of_its_codes(bits: int) -> None:
    linear = PackedLinear(512, 192, WeightSpec(bits, 128))
    assert linear.words.nbytes * 8 == 192 * 512 * bits
    assert not list(linear.parameters())


def test_describes_itself() -> None:
    assert "bits=3, group_size=16, activation_bits=4" in repr(
        PackedLinear(COLUMNS, ROWS, WeightSpec(3, 16), ActivationSpec(4))
    )
