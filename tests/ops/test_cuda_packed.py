"""Packed codes on a device against the torch defaults on the host."""

from itertools import product

import pytest
import torch
from torch import Tensor

from omniquant_pl import ops
from omniquant_pl.ops import _default_linear, _default_pack

pytestmark = pytest.mark.gpu

OPERATORS = torch.ops.omniquant_pl
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def packed(
    bits: int, out: int, columns: int, group_size: int, *, scale_dtype: torch.dtype = torch.float16, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales and zero points on the host."""
    shape = (out, -(-columns // group_size))
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    zero_point = None if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return _default_pack.pack(codes, bits, "planes"), (torch.rand(shape) + 0.5).to(scale_dtype), zero_point


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def assert_product(
    actual: Tensor, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bits: int, group: int
) -> None:
    """The product in float64, up to the rounding of the matrix unit's sums and of the result."""
    matrix = _default_linear.dequantize(*weight, bits, group, x.shape[1]).double()
    expected = x.double() @ matrix.T
    terms = x.double().abs() @ (matrix.abs() + 2**bits * weight[1].double().amax()).T
    error = (actual.double().cpu() - expected).abs()
    assert actual.dtype == x.dtype
    assert (error <= expected.abs() * HALF_STEP[x.dtype] + terms * 2.0**-17).all()


@pytest.mark.parametrize("layout", ["stream", "words", "planes"])
def test_packing(layout: str) -> None:
    for bits, columns in product(range(1, 9), (0, 1, 31, 33, 509, 4096)):
        codes = torch.randint(0, 256, (37, columns), dtype=torch.uint8)
        words = ops.pack(codes.cuda(), bits, layout)
        assert torch.equal(words.cpu(), _default_pack.pack(codes, bits, layout)), (bits, columns)
        assert torch.equal(ops.unpack(words, bits, columns, layout).cpu(), codes & (2**bits - 1)), (bits, columns)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("out", "columns", "group_size"),
    [
        (1, 1, 1),
        (5, 100, 100),
        (33, 416, 32),
        (50, 300, 128),
        (128, 4096, 64),
        (257, 1120, 160),
        (4096, 4096, 128),
        (8200, 1024, 1024),
    ],
)
def test_products(out: int, columns: int, group_size: int, bits: int) -> None:
    for dtype, symmetric in product(FLOATS, (False, True)):
        weight = packed(bits, out, columns, group_size, scale_dtype=dtype, symmetric=symmetric)
        words, scale, zero_point = on_device(*weight)
        for n in (1, 2, 7, 8, 9, 16, 17, 40):
            x = torch.randn(n, columns).to(dtype)
            result = ops.packed_linear(x.cuda(), words, scale, zero_point, bits, group_size)
            assert_product(result, x, weight, bits, group_size)


@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_scales_of_every_type(scale_dtype: torch.dtype) -> None:
    weight = packed(4, 70, 640, 128, scale_dtype=scale_dtype, symmetric=False)
    for x_dtype in FLOATS:
        x = torch.randn(3, 640).to(x_dtype)
        assert_product(ops.packed_linear(x.cuda(), *on_device(*weight), 4, 128), x, weight, 4, 128)


@pytest.mark.parametrize(
    ("bits", "group_size", "n"), [(1, 32, 2), (5, 32, 2), (6, 640, 1), (7, 128, 16), (4, 20, 2), (4, 32, 300)]
)
def test_what_the_kernel_does_not_compute(bits: int, group_size: int, n: int) -> None:
    weight = packed(bits, 40, 640, group_size, symmetric=False)
    x = torch.randn(n, 640)
    expected = _default_linear.packed_linear(x, *weight, bits, group_size)
    actual = ops.packed_linear(x.cuda(), *on_device(*weight), bits, group_size)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-2)


def test_alignment_does_not_matter() -> None:
    weight = packed(4, 20, 256, 128, symmetric=False)
    words, scale, zero_point = on_device(*weight)
    words = torch.cat([torch.zeros(1, dtype=torch.int32, device="cuda"), words.flatten()])[1:].view(20, 32)
    x = torch.randn(1025).bfloat16()[1:].view(4, 256)
    shifted = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()]).cuda()[1:].view(4, 256)
    assert_product(ops.packed_linear(shifted, words, scale, zero_point, 4, 128), x, weight, 4, 128)


def test_the_same_bits_every_time() -> None:
    weight = on_device(*packed(3, 4096, 4096, 128, symmetric=False))
    x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    first = ops.packed_linear(x, *weight, 3, 128)
    assert all(torch.equal(ops.packed_linear(x, *weight, 3, 128), first) for _ in range(20))


def test_graph() -> None:
    """Captured once, replayed on other numbers."""
    weight = packed(4, 512, 1024, 128, symmetric=False)
    device = on_device(*weight)
    x = torch.zeros(2, 1024, device="cuda", dtype=torch.float16)
    ops.packed_linear(x, *device, 4, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = ops.unpack(device[0], 4, 1024, "planes")
        words = ops.pack(codes, 4, "planes")
        result = ops.packed_linear(x, words, device[1], device[2], 4, 128)
    other = torch.randn(2, 1024).half()
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_product(result, other, weight, 4, 128)


def test_stream() -> None:
    """The kernel runs behind what its stream has before it."""
    weight = packed(4, 512, 1024, 128, symmetric=False)
    device = on_device(*weight)
    x = torch.randn(2, 1024)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros(2, 1024, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        result = ops.packed_linear(late, *device, 4, 128)
    stream.synchronize()
    assert_product(result, x, weight, 4, 128)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_opcheck(bits: int) -> None:
    words, scale, zero_point = on_device(*packed(bits, 24, 96, 32, symmetric=False))
    for x in (torch.randn(3, 96, device="cuda"), torch.randn(3, 96, device="cuda", requires_grad=True)):
        torch.library.opcheck(OPERATORS.packed_linear, (x, words, scale, zero_point, bits, 32))
    torch.library.opcheck(OPERATORS.unpack, (words, bits, 96, "planes"))
    codes = torch.zeros(4, 96, dtype=torch.uint8, device="cuda")
    torch.library.opcheck(OPERATORS.pack, (codes, bits, "planes"))
