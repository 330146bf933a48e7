"""The compiled kernels against the torch defaults, and how they are found."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from omniquant_pl import ops
from omniquant_pl.ops import _default, _native, _threads
from omniquant_pl.ops._cpu import cpu_kernels
from omniquant_pl.ops._cuda import cuda_kernels

ROOT = Path(__file__).parents[2]
KERNELS = cpu_kernels()
needs_library = pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, x, scale and zero point in float32, some elements outside the grid."""
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(1, 150))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = 10.0 ** draw(st.integers(-20, 15))
    x = torch.randn(rows, columns, generator=random) * size
    if draw(st.booleans()):
        x = (x / size).round() * size  # ties, and zeros of both signs
    if draw(st.booleans()):
        x = x.abs()
    grad = torch.randn(rows, columns, generator=random)
    scale = (torch.rand(rows, 1, generator=random) + 0.1) * size / draw(st.integers(1, 10))
    zero_point = torch.randint(-3, 18, (rows, 1), generator=random).float()
    return grad, x, scale, zero_point


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@needs_library
@given(cases())
def test_static_equals_default(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    grad, x, scale, zero_point = case
    grid = (scale, zero_point, 0, 15)
    assert same_bits(KERNELS.fake_quantize(x, *grid), _default.fake_quantize(x, *grid))
    actual = KERNELS.fake_quantize_backward(grad, x, *grid)
    expected = _default.fake_quantize_backward(grad, x, *grid)
    assert torch.equal(actual[0], expected[0])
    assert_near(actual[1], expected[1])
    assert_near(actual[2] / scale, expected[2] / scale)


@needs_library
@given(cases(), st.integers(2, 8), st.booleans())
def test_dynamic_equals_default(case: tuple[Tensor, Tensor, Tensor, Tensor], bits: int, symmetric: bool) -> None:
    grad, x, _, _ = case
    actual = KERNELS.dynamic_fake_quantize(x, bits, symmetric)
    assert same_bits(actual, _default.dynamic_fake_quantize(x, bits, symmetric))
    assert_near(
        KERNELS.dynamic_fake_quantize_backward(grad, x, bits, symmetric),
        _default.dynamic_fake_quantize_backward(grad, x, bits, symmetric),
    )


@needs_library
@pytest.mark.parametrize("symmetric", [False, True])
def test_extreme_numbers(symmetric: bool) -> None:
    """Subnormals, the largest floats, infinities and NaN: the same bits, NaN for NaN."""
    largest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    values = [largest, -largest, tiny, tiny / 8, -0.0, 1.0, float("inf"), float("nan")]
    x = torch.tensor(values).repeat(len(values), 5)
    for row, value in enumerate(values):
        x[row, x[row] > value] = value
    actual = KERNELS.dynamic_fake_quantize(x, 4, symmetric)
    expected = _default.dynamic_fake_quantize(x, 4, symmetric)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@needs_library
def test_strides_and_alignment_do_not_matter() -> None:
    base = torch.randn(41, 30)
    for x in (base.T, base[:, ::3], base.flatten()[1:1201].view(40, 30), base[1:2].expand(7, 30)):
        actual = ops.dynamic_fake_quantize(x, 4, False)
        assert same_bits(actual, _default.dynamic_fake_quantize(x, 4, False))
        assert actual.is_contiguous()


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(_threads, "MIN_PARALLEL_ELEMENTS", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_threads_do_not_change_the_result(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = torch.randn(rows, 77), torch.randn(rows, 77)
    scale, zero_point = torch.full((rows, 1), 0.3), torch.full((rows, 1), 5.0)
    split = KERNELS.fake_quantize_backward(grad, x, scale, zero_point, 0, 15)
    monkeypatch.setattr(_threads, "MIN_PARALLEL_ELEMENTS", 1 << 60)
    whole = KERNELS.fake_quantize_backward(grad, x, scale, zero_point, 0, 15)
    assert all(same_bits(one, other) for one, other in zip(split, whole, strict=True))


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_thread_is_raised() -> None:
    def fail(begin: int, end: int) -> None:
        if begin > 0:
            raise RuntimeError("in a thread")

    with pytest.raises(RuntimeError, match="in a thread"):
        _threads.split_rows(fail, rows=9, columns=4)


def test_header_and_loader_agree() -> None:
    header = (ROOT / "csrc" / "include" / "omniquant.h").read_text()
    version = re.search(r"#define OMNIQUANT_ABI_VERSION (\d+)", header)
    assert version is not None
    assert int(version[1]) == _native.ABI_VERSION


def test_absent_library_is_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert _native.load("libomniquant", [str(tmp_path)]) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_unreadable_library_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"libomniquant{_native.SUFFIX}").write_bytes(b"not a library")
    assert _native.load("libomniquant", [str(tmp_path)]) is None
    assert "cannot be loaded" in caplog.text


@needs_library
def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(_native, "ABI_VERSION", _native.ABI_VERSION + 1)
    assert _native.load("libomniquant") is None
    assert "rebuild it" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 31, 128, 1000, 4096, 20000])
@pytest.mark.parametrize("symmetric", [False, True])
def test_cuda_equals_cpu(columns: int, symmetric: bool) -> None:
    kernels = cuda_kernels()
    if kernels is None:
        pytest.skip("the CUDA kernels are not built")
    grad, x = torch.randn(37, columns), torch.randn(37, columns)
    scale, zero_point = torch.rand(37, 1) / 4 + 0.05, torch.randint(0, 15, (37, 1)).float()
    grid = (scale.cuda(), zero_point.cuda(), 0, 15)
    host = _default.fake_quantize(x, scale, zero_point, 0, 15)
    assert torch.equal(kernels.fake_quantize(x.cuda(), *grid).cpu(), host)
    grads = kernels.fake_quantize_backward(grad.cuda(), x.cuda(), *grid)
    expected = _default.fake_quantize_backward(grad, x, scale, zero_point, 0, 15)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows, passed = x.to(dtype), grad.to(dtype)
        actual = kernels.dynamic_fake_quantize(rows.cuda(), 4, symmetric).cpu()
        assert torch.equal(actual, _default.dynamic_fake_quantize(rows, 4, symmetric))
        slope = kernels.dynamic_fake_quantize_backward(passed.cuda(), rows.cuda(), 4, symmetric)
        wanted = _default.dynamic_fake_quantize_backward(passed, rows, 4, symmetric)
        torch.testing.assert_close(slope.cpu(), wanted, rtol=1e-2, atol=1e-3)
