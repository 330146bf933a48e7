"""The operators against a float64 formula, and their gradients against autograd of the formula."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from omniquant_pl import ops

TINY = torch.finfo(torch.float32).tiny
OPERATORS = torch.ops.omniquant_pl

# Halves and zeros make ties in rounding and in the extremes.
NUMBERS = st.one_of(
    st.integers(-6, 6).map(lambda n: n / 2),
    st.floats(-1e3, 1e3, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-40, -1e-40]),
)
BITS = st.integers(2, 8)


@st.composite
def matrices(draw: st.DrawFn, rows: tuple[int, int] = (1, 5)) -> Tensor:
    """Float64 [rows, columns]."""
    row_count = draw(st.integers(*rows))
    columns = draw(st.integers(1, 20))
    row = st.lists(NUMBERS, min_size=columns, max_size=columns)
    values = draw(st.lists(row, min_size=row_count, max_size=row_count))
    return torch.tensor(values, dtype=torch.float64).reshape(row_count, columns)


@st.composite
def static_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    x = draw(matrices())
    quant_min = draw(st.sampled_from([0, -8]))
    quant_max = quant_min + draw(st.sampled_from([3, 15]))
    scales = st.lists(st.floats(1e-3, 10.0), min_size=len(x), max_size=len(x))
    zeros = st.lists(st.integers(-20, 20), min_size=len(x), max_size=len(x))
    scale = torch.tensor(draw(scales), dtype=torch.float64).unsqueeze(1)
    zero_point = torch.tensor(draw(zeros), dtype=torch.float64).unsqueeze(1)
    return x, scale, zero_point, quant_min, quant_max


def quantize_number(x: float, scale: float, zero_point: float, low: int, high: int) -> float:
    """One number, in Python's arithmetic; `round` rounds half to even."""
    return (min(max(round(x / scale) + zero_point, low), high) - zero_point) * scale


def quantize_row(row: list[float], bits: int, symmetric: bool) -> list[float]:
    """One row on its own grid."""
    if symmetric:
        half = 2 ** (bits - 1)
        scale = max(max(abs(x) for x in row) / (half - 1), TINY)
        return [quantize_number(x, scale, 0, -half, half - 1) for x in row]
    levels = 2**bits - 1
    low, high = min(*row, 0.0), max(*row, 0.0)
    scale = max((high - low) / levels, TINY)
    zero_point = min(max(round(-low / scale), 0), levels)
    return [quantize_number(x, scale, zero_point, 0, levels) for x in row]


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def naive(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    codes = (straight_through(x / scale) + zero_point).clamp(low, high)
    return (codes - zero_point) * scale


def naive_dynamic(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The formula for autograd: an end of the range is an element or the constant zero."""
    if symmetric:
        half = 2 ** (bits - 1)
        scale = (x.abs().amax(1, keepdim=True) / (half - 1)).clamp(min=TINY)
        return naive(x, scale, torch.zeros_like(scale), -half, half - 1)
    levels = 2**bits - 1
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    low, high = torch.where(low < 0, low, 0.0), torch.where(high > 0, high, 0.0)
    scale = ((high - low) / levels).clamp(min=TINY)
    zero_point = straight_through(-low / scale).clamp(0, levels)
    return naive(x, scale, zero_point, 0, levels)


def noise_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))


@given(static_cases())
def test_static_formula(case: tuple[Tensor, Tensor, Tensor, int, int]) -> None:
    x, scale, zero_point, low, high = case
    expected = [
        [quantize_number(value, s, z, low, high) for value in row]
        for row, s, z in zip(x.tolist(), scale.flatten().tolist(), zero_point.flatten().tolist(), strict=True)
    ]
    assert ops.fake_quantize(*case).tolist() == expected


@given(static_cases())
def test_static_gradients(case: tuple[Tensor, Tensor, Tensor, int, int]) -> None:
    x, scale, zero_point, low, high = case
    leaves = [tensor.clone().requires_grad_() for tensor in (x, scale, zero_point)]
    grad = noise_like(x)
    expected = torch.autograd.grad(naive(*leaves, low, high), leaves, grad)
    actual = ops.fake_quantize_backward(grad, *case)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(matrices(), BITS, st.booleans())
def test_dynamic_formula(x: Tensor, bits: int, symmetric: bool) -> None:
    expected = [quantize_row(row, bits, symmetric) for row in x.tolist()]
    assert ops.dynamic_fake_quantize(x, bits, symmetric).tolist() == expected


@given(matrices(), BITS, st.booleans())
def test_dynamic_gradient(x: Tensor, bits: int, symmetric: bool) -> None:
    leaf = x.clone().requires_grad_()
    grad = noise_like(x)
    (expected,) = torch.autograd.grad(naive_dynamic(leaf, bits, symmetric), leaf, grad)
    actual = ops.dynamic_fake_quantize_backward(grad, x, bits, symmetric)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(matrices())
def test_extremes_are_those_of_python(dtype: torch.dtype, x: Tensor) -> None:
    rows = x.to(dtype).tolist()
    low, high, low_at, high_at = (result.flatten().tolist() for result in ops.row_extremes(x.to(dtype)))
    assert (low, high) == ([min(row) for row in rows], [max(row) for row in rows])
    assert low_at == [row.index(min(row)) for row in rows]
    assert high_at == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 7, 33, 1000])
def test_extremes_of_a_row_with_a_nan(columns: int, dtype: torch.dtype) -> None:
    x = torch.arange(2.0 * columns, dtype=dtype).view(2, columns)
    x[1, columns // 2 :] = math.nan
    low, high, low_at, high_at = ops.row_extremes(x)
    assert (low[0].item(), high[0].item()) == (0, columns - 1)
    assert low[1].isnan()
    assert high[1].isnan()
    assert low_at[1].item() == high_at[1].item() == columns // 2
    with pytest.raises(ValueError, match="at least one column"):
        ops.row_extremes(torch.empty(2, 0))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_and_halves_follow_the_formula(dtype: torch.dtype, symmetric: bool) -> None:
    """Chosen values: halves of powers of two, exact in every dtype and free of rounding ties."""
    x = torch.tensor([[-4.0, -1.0, 0.0, 0.25, 3.5], [0.0, 0.0, 1.0, 2.0, 7.5]], dtype=dtype)
    expected = torch.tensor([quantize_row(row, 4, symmetric) for row in x.tolist()])
    actual = ops.dynamic_fake_quantize(x, 4, symmetric)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype))
    grad = ops.dynamic_fake_quantize_backward(torch.ones_like(x), x, 4, symmetric)
    wide = ops.dynamic_fake_quantize_backward(torch.ones(x.shape, dtype=torch.float64), x.double(), 4, symmetric)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, wide.to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (4, 1), (1, 1), (3, 7)])
def test_shapes(shape: tuple[int, int], symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype)
    assert ops.dynamic_fake_quantize(x, 4, symmetric).shape == shape
    assert ops.dynamic_fake_quantize_backward(x, x, 4, symmetric).shape == shape
    if dtype != torch.bfloat16:
        scale, zero_point = (
            torch.ones(shape[0], 1, dtype=dtype),
            torch.zeros(shape[0], 1, dtype=dtype),
        )
        assert ops.fake_quantize(x, scale, zero_point, 0, 15).tolist() == x.tolist()
        grads = ops.fake_quantize_backward(x, x, scale, zero_point, 0, 15)
        assert [grad.shape for grad in grads] == [shape, (shape[0], 1), (shape[0], 1)]
        assert grads[2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_rows_stay_zero(zero: float, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.full((2, 33), zero, dtype=dtype)
    result = ops.dynamic_fake_quantize(x, 4, symmetric)
    assert result.count_nonzero() == 0
    assert not result.signbit().any()
    grad = ops.dynamic_fake_quantize_backward(torch.ones_like(x), x, 4, symmetric)
    assert grad.tolist() == torch.ones_like(x).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_stay_non_finite(bad: float, symmetric: bool, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 66, dtype=dtype).reshape(2, 33)
    x[1, 17] = bad
    result = ops.dynamic_fake_quantize(x, 4, symmetric)
    assert result[0].isfinite().all()
    assert not result[1].isfinite().all()
    ops.dynamic_fake_quantize_backward(torch.ones_like(x), x, 4, symmetric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_static_saturates_infinity_and_keeps_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    result = ops.fake_quantize(x, one, one, 0, 15)
    torch.testing.assert_close(result, torch.tensor([[14.0, -1.0, math.nan, 1.0]], dtype=dtype), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.ones(3)}, ValueError),
        ({"x": torch.ones(2, 3, dtype=torch.int32)}, TypeError),
        ({"scale": torch.ones(3, 1)}, ValueError),
        ({"scale": torch.ones(2)}, ValueError),
        ({"zero_point": torch.zeros(2, 1, dtype=torch.float64)}, TypeError),
        ({"quant_max": 0}, ValueError),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], error: type[Exception]) -> None:
    arguments = {
        "x": torch.ones(2, 3),
        "scale": torch.ones(2, 1),
        "zero_point": torch.zeros(2, 1),
        "quant_min": 0,
        "quant_max": 15,
    }
    with pytest.raises(error, match="expected"):
        ops.fake_quantize(**{**arguments, **change})


@pytest.mark.parametrize("bits", [1, 17])
def test_wrong_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"got {bits}"):
        ops.dynamic_fake_quantize(torch.ones(2, 3), bits, False)


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected grad like x"):
        ops.dynamic_fake_quantize_backward(torch.ones(2, 4), torch.ones(2, 3), 4, False)


def operator_cases(dtype: torch.dtype) -> list[tuple[object, tuple[object, ...]]]:
    x = torch.linspace(-1, 1, 15, dtype=dtype).reshape(3, 5)
    scale, zero_point = torch.full((3, 1), 0.1, dtype=dtype), torch.ones(3, 1, dtype=dtype)
    return [
        (OPERATORS.fake_quantize, (x, scale, zero_point, 0, 15)),
        (OPERATORS.fake_quantize_backward, (x, x, scale, zero_point, 0, 15)),
        (OPERATORS.dynamic_fake_quantize, (x, 4, False)),
        (OPERATORS.dynamic_fake_quantize_backward, (x, x, 4, True)),
        (OPERATORS.row_extremes, (x,)),
    ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(index: int, dtype: torch.dtype) -> None:
    operator, arguments = operator_cases(dtype)[index]
    torch.library.opcheck(operator, arguments)


def both(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    weight = ops.fake_quantize(x * 2, scale, zero_point, 0, 15)
    return ops.dynamic_fake_quantize(weight + 1, 4, False).sum(dim=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    x, scale, zero_point = torch.randn(6, 40), torch.full((6, 1), 0.2), torch.full((6, 1), 7.0)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, scale, zero_point), both(x, scale, zero_point))
