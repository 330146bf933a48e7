"""The packed product against a float64 matrix product, and its gradient against that of the formula."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from omniquant_pl import ops
from omniquant_pl.ops import _cpu, _default_linear
from omniquant_pl.ops._cpu import cpu_kernels

KERNELS = cpu_kernels()
needs_library = pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VECTORS = [16, 8, 1]  # floats: AVX-512, AVX2, any processor


class Case(NamedTuple):
    x: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]:
        words = ops.pack(self.codes, self.bits, "planes")
        return self.x, words, self.scale, self.zero_point, self.bits, self.group_size


def make_case(
    n: int,
    columns: int,
    rows: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    seed: int = 0,
) -> Case:
    random = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    return Case(
        torch.randn(n, columns, generator=random).to(dtypes[0]),
        torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=random),
        (torch.rand(rows, groups, generator=random) + 0.1).to(dtypes[1]),
        None if symmetric else torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=random),
        bits,
        group_size,
    )


@st.composite
def cases(draw: st.DrawFn, compiled: bool = False) -> Case:
    """Any of them, or such as the compiled kernels take."""
    columns = draw(st.one_of(st.integers(0, 200), st.sampled_from([256, 511, 512, 1000, 1056])))
    sizes = [32, 64, 96, 128, 256, 2000]
    group_size = draw(st.sampled_from(sizes) if compiled else st.one_of(st.integers(1, 300), st.sampled_from(sizes)))
    return make_case(
        draw(st.integers(0, 9)),
        columns,
        draw(st.integers(0, 9)),
        draw(st.sampled_from([2, 3, 4, 8] if compiled else range(1, 9))),
        group_size,
        symmetric=draw(st.booleans()),
        dtypes=(draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))),
        seed=draw(st.integers(0, 2**31)),
    )


def spread(case: Case, values: Tensor) -> Tensor:
    """Values of groups for every column, float64."""
    return values.double().repeat_interleave(case.group_size, 1)[:, : case.codes.shape[1]]


def dequantized(case: Case) -> Tensor:
    """The weight, [out, in] in float64."""
    zero = 2 ** (case.bits - 1) if case.zero_point is None else spread(case, case.zero_point)
    return (case.codes.double() - zero) * spread(case, case.scale)


def assert_product(actual: Tensor, case: Case) -> None:
    """To the rounding of float32 sums of codes and of zero points, then to that of the result's dtype."""
    expected = case.x.double() @ dequantized(case).T
    assert actual.dtype == case.x.dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    terms = case.x.double().abs() @ (spread(case, case.scale) * 2 ** (case.bits + 1)).T
    finest = {torch.float16: 2.0**-24}.get(actual.dtype, 0.0)
    allowed = 1e-6 * terms + torch.finfo(actual.dtype).eps * expected.abs() + finest
    assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.fixture(params=VECTORS)
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "WIDEST_VECTOR", request.param)
    monkeypatch.setattr(_cpu, "MAX_TOKENS", 10**6)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", [ops, _default_linear])
@given(case=cases())
def test_product_is_that_of_the_dequantized_weight(kernels: object, case: Case) -> None:
    assert_product(kernels.packed_linear(*case.arguments), case)


@needs_library
@pytest.mark.parametrize("lanes", VECTORS)
@given(case=cases(compiled=True))
def test_every_vector_width_gives_the_product(lanes: int, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "WIDEST_VECTOR", lanes)
        patch.setattr(_cpu, "MAX_TOKENS", 10**6)
        patch.setattr(_default_linear, "packed_linear", None)  # it is the compiled kernel that answers
        assert_product(KERNELS.packed_linear(*case.arguments), case)


@given(case=cases())
def test_a_slice_at_a_time_gives_the_same(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_default_linear, "SLICE_ELEMENTS", 300)
        assert_product(_default_linear.packed_linear(*case.arguments), case)


@given(case=cases())
def test_gradient_is_that_of_the_dequantized_weight(case: Case) -> None:
    x = case.x.clone().requires_grad_()
    result = ops.packed_linear(x, *case.arguments[1:])
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    (actual,) = torch.autograd.grad(result, x, grad)
    expected = grad.double() @ dequantized(case)
    terms = grad.double().abs() @ dequantized(case).abs()
    allowed = 1e-6 * terms + torch.finfo(actual.dtype).eps * expected.abs() + 2.0**-24
    assert actual.dtype == x.dtype
    assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(bits: int, dtype: torch.dtype) -> None:
    x, *weight = make_case(19, 1000, 13, bits, 128, dtypes=(dtype, torch.float16)).arguments
    together = ops.packed_linear(x, *weight)
    alone = torch.cat([ops.packed_linear(row, *weight) for row in x.split(1)])
    assert torch.equal(together, alone)


@needs_library
@pytest.mark.usefixtures("vectors", "three_threads")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 701])
def test_threads_do_not_change_the_result(bits: int, rows: int) -> None:
    case = make_case(2, 1000, rows, bits, 64)
    split = [ops.packed_linear(*case.arguments) for _ in range(5)]
    assert_product(split[0], case)
    torch.set_num_threads(1)
    whole = ops.packed_linear(*case.arguments)
    assert all(torch.equal(result, whole) for result in split)


@needs_library
@pytest.mark.usefixtures("three_threads")
def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    arguments = [make_case(1, 1024, 1024, 4, 128, seed=seed).arguments for seed in range(4)]
    expected = [ops.packed_linear(*each) for each in arguments]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            results = list(pool.map(lambda each: ops.packed_linear(*each), arguments))
            assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.usefixtures("three_threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    arguments = make_case(1, 1024, 1024, 4, 128).arguments
    expected = ops.packed_linear(*arguments)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.packed_linear(*arguments), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_stay_non_finite_and_alone(bits: int, bad: float) -> None:
    case = make_case(3, 100, 5, bits, 64)
    case.x[1, 77] = bad
    result = ops.packed_linear(*case.arguments)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("vectors")
def test_every_float16_passes_through() -> None:
    """The weight is the identity: a number is read, multiplied by one and written."""
    finite = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = finite[finite.isfinite()].view(-1, 32)
    words = ops.pack(torch.eye(32, dtype=torch.uint8), 4, "planes")
    one, zero = torch.ones(32, 1), torch.zeros(32, 1, dtype=torch.uint8)
    assert torch.equal(ops.packed_linear(x, words, one, zero, 4, 32), x)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("size", [2.0**-15, 1.0, 2.0**13])
def test_results_are_rounded_to_nearest_even(size: float) -> None:
    """The same sums in float32, rounded by torch; subnormal, normal and overflowing ones."""
    case = make_case(8, 64, 300, 4, 32)
    x = (case.x * size).half()
    wide = ops.packed_linear(x.float(), *case.arguments[1:])
    assert torch.equal(ops.packed_linear(x, *case.arguments[1:]), wide.half())


@pytest.mark.usefixtures("vectors")
def test_strides_and_alignment_do_not_matter() -> None:
    case = make_case(6, 100, 7, 3, 32)
    x, words, scale, zero_point, bits, group_size = case.arguments
    apart = [torch.stack([each, each], dim=2).flatten(1)[:, ::2] for each in (x, words, scale, zero_point)]
    assert_product(ops.packed_linear(*apart, bits, group_size), case)
    moved = [torch.cat([each.flatten()[:1], each.flatten()])[1:].view(each.shape) for each in apart]
    assert_product(ops.packed_linear(*moved, bits, group_size), case)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 65)}, ValueError, "expected 12 words for 65 columns"),
        ({"x": torch.ones(64)}, ValueError, r"got shape \[64\]"),
        ({"x": torch.ones(3, 64, dtype=torch.float64)}, TypeError, r"got torch\.float64"),
        ({"words": torch.zeros(5, 8, dtype=torch.int64)}, TypeError, r"got torch\.int64"),
        ({"words": torch.zeros(5, 7, dtype=torch.int32)}, ValueError, "got 7"),
        ({"scale": torch.ones(5, 3)}, ValueError, r"expected scale as \[5, 2\], got \[5, 3\]"),
        ({"scale": torch.ones(4, 2)}, ValueError, r"expected scale as \[5, 2\], got \[4, 2\]"),
        ({"scale": torch.ones(5, 2, dtype=torch.int32)}, TypeError, "expected scale"),
        ({"zero_point": torch.ones(5, 1, dtype=torch.uint8)}, ValueError, "expected zero_point"),
        ({"zero_point": torch.ones(5, 2)}, TypeError, "expected zero_point"),
        ({"bits": 9}, ValueError, "got 9"),
        ({"group_size": 0}, ValueError, "expected group_size of at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("kernels", [ops, _default_linear])
def test_wrong_arguments_are_refused(
    kernels: object, change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {
        "x": torch.ones(3, 64),
        "words": torch.zeros(5, 8, dtype=torch.int32),
        "scale": torch.ones(5, 2),
        "zero_point": torch.zeros(5, 2, dtype=torch.uint8),
        "bits": 4,
        "group_size": 32,
    }
    with pytest.raises(error, match=message):
        kernels.packed_linear(**{**arguments, **change})


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    case = make_case(3, 45, 5, bits, 32, symmetric=symmetric, dtypes=(dtype, torch.float16))
    arguments = (case.x.requires_grad_(), *case.arguments[1:])
    torch.library.opcheck(torch.ops.omniquant_pl.packed_linear, arguments)
    grad = torch.randn(3, 5).to(dtype)
    torch.library.opcheck(torch.ops.omniquant_pl.packed_linear_backward, (grad, *arguments[1:], 45))


def layer(x: Tensor, *weight: object) -> Tensor:
    return ops.packed_linear(x * 2, *weight).relu()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    x, *weight = make_case(4, 96, 10, 4, 32).arguments
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        result = function(leaf, *weight)
        results.append((result, *torch.autograd.grad(result.sum(), leaf)))
    torch.testing.assert_close(results[1], results[0])
