"""The CUDA kernels of packed codes, run on the host: compiled by its C++ compiler, lanes as fibers.

What stands in for CUDA is in `emulation`. It knows the matrix instruction by its manual, not a device's
rounding; asynchronous copies arrive as early or as late as they may, threads run in either order.
"""

import ctypes
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from omniquant_pl.ops import _default_pack
from omniquant_pl.ops._cuda_packed import PackedCudaKernels

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
COMPILER = shutil.which("g++")
KERNELS = ["packed_linear.cu", "pack.cu"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w"]

pytestmark = pytest.mark.skipif(COMPILER is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
H200_SHARED = 232448  # bytes a block may have
ADA_SHARED = 101376

# rows of x, columns, output channels, group size
SHAPES = [
    (1, 256, 32, 128),  # whole chunks, aligned
    (1, 2048, 16, 512),
    (1, 416, 40, 32),  # groups that end inside of a unit
    (1, 331, 70, 96),
    (2, 1, 1, 1),  # the smallest
    (3, 100, 5, 100),  # per channel, ragged everywhere
    (5, 300, 50, 128),  # a last group that is shorter
    (9, 416, 40, 32),
    (9, 1000, 33, 320),  # two tiles of x
    (16, 544, 33, 96),
    (17, 640, 17, 160),  # a second block of x
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, with the stand-ins of `emulation` before the headers of CUDA."""
    folder = tmp_path_factory.mktemp("emulated")
    for path in [*(ROOT / "csrc" / "cuda").glob("*.cu*"), *EMULATION.iterdir()]:
        shutil.copy(path, folder)
    includes = [f"-I{path}" for path in (folder, ROOT / "csrc" / "common", ROOT / "csrc" / "include")]
    target = folder / "libemulated.so"
    sources = ["-x", "c++", *KERNELS, "emulation.cpp"]
    subprocess.run([COMPILER, *FLAGS, *includes, "-shared", "-o", target, *sources], cwd=folder, check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.emulation_announce.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


@pytest.fixture
def kernels(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> PackedCudaKernels:
    """Our own binding, to tensors of the host."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=None))
    configure(library)
    return PackedCudaKernels(library, lambda device: True)


def configure(
    library: ctypes.CDLL, processors: int = 4, shared: int = H200_SHARED, eager: bool = False, backwards: bool = False
) -> None:
    library.emulation_configure(processors, shared, eager, backwards)


def announce(library: ctypes.CDLL, *tensors: Tensor | None) -> None:
    """Allow the kernels to read from these and nothing else."""
    for tensor in tensors:
        if tensor is not None:
            library.emulation_announce(tensor.data_ptr(), tensor.nbytes)


class Weight:
    """Random codes, their packed form, and the weight that they stand for in float64."""

    def __init__(self, bits: int, out: int, columns: int, group_size: int, scale_dtype: torch.dtype, symmetric: bool):
        shape = (out, -(-columns // group_size))
        self.codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
        self.words = _default_pack.pack(self.codes, bits, "planes")
        self.scale = (torch.rand(shape) + 0.5).to(scale_dtype)
        self.zero_point = None if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        zeros = torch.full(shape, 2 ** (bits - 1)) if symmetric else self.zero_point
        group = torch.arange(columns) // group_size
        scale = self.scale.double()[:, group]
        self.matrix = (self.codes.double() - zeros.double()[:, group]) * scale
        self.size = (self.codes.double() + zeros.double()[:, group]) * scale

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.words, self.scale, self.zero_point


def assert_product(actual: Tensor, x: Tensor, weight: Weight, rounding: float = 2.0**-21) -> None:
    """The float64 product, up to the rounding of float32 sums and of the result."""
    expected = x.double() @ weight.matrix.T
    terms = x.double().abs() @ weight.size.T
    error = (actual.double() - expected).abs()
    assert actual.dtype == x.dtype
    assert (error <= expected.abs() * HALF_STEP[x.dtype] + terms * rounding).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products(
    bits: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    library: ctypes.CDLL,
    kernels: PackedCudaKernels,
) -> None:
    n, columns, out, group_size = shape
    case = bits + FLOATS.index(dtype) + SHAPES.index(shape)
    weight = Weight(bits, out, columns, group_size, FLOATS[case % 3], symmetric=case % 4 == 0)
    x = torch.randn(n, columns).to(dtype)
    for processors, shared in ((1, ADA_SHARED), (100, H200_SHARED)):  # 8 warps a block, then 16
        configure(library, processors, shared, eager=case % 2 == 0, backwards=case // 2 % 2 == 0)
        announce(library, x, *weight.tensors())
        result = kernels.packed_linear(x, *weight.tensors(), bits, group_size)
        assert_product(result, x, weight)
        assert library.emulation_bad_reads() == 0


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_copies_and_threads_in_any_order(
    bits: int, backwards: bool, eager: bool, library: ctypes.CDLL, kernels: PackedCudaKernels
) -> None:
    """A long row for few warps: each fills every slot of its ring several times."""
    weight = Weight(bits, 16, 3100, 64, torch.float32, symmetric=False)
    x = torch.randn(1, 3100).bfloat16()
    configure(library, shared=20000, eager=eager, backwards=backwards)
    assert_product(kernels.packed_linear(x, *weight.tensors(), bits, 64), x, weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unit_vectors_give_the_codes(bits: int, dtype: torch.dtype, kernels: PackedCudaKernels) -> None:
    """No rounding at all: every code in every place of a lane."""
    weight = Weight(bits, 48, 64, 64, torch.float32, symmetric=True)
    weight.scale.fill_(1.0)
    result = kernels.packed_linear(torch.eye(64, dtype=dtype), *weight.tensors(), bits, 64)
    assert torch.equal(result, (weight.codes.int() - 2 ** (bits - 1)).T.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float32_keeps_its_range(bits: int, kernels: PackedCudaKernels) -> None:
    """The three parts of a number add up, whatever its exponent."""
    weight = Weight(bits, 16, 64, 64, torch.float32, symmetric=False)
    for power in (-100, -50, 0, 50, 110):
        x = torch.randn(8, 64) * 2.0**power
        assert_product(kernels.packed_linear(x, *weight.tensors(), bits, 64), x, weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_so_in_its_row(dtype: torch.dtype, value: float, kernels: PackedCudaKernels) -> None:
    weight = Weight(4, 16, 96, 32, torch.float32, symmetric=False)
    x = torch.randn(3, 96).to(dtype)
    x[1, 40] = value
    result = kernels.packed_linear(x, *weight.tensors(), 4, 32)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


def test_alignment_does_not_matter(library: ctypes.CDLL, kernels: PackedCudaKernels) -> None:
    """Rows of x and of the weight that begin at no multiple of 16 bytes."""
    weight = Weight(4, 20, 256, 128, torch.float16, symmetric=False)
    words = torch.cat([torch.zeros(1, dtype=torch.int32), weight.words.flatten()])[1:].view(20, 32)
    x = torch.randn(1025).bfloat16()[1:].view(4, 256)
    announce(library, x, words, weight.scale, weight.zero_point)
    assert_product(kernels.packed_linear(x, words, weight.scale, weight.zero_point, 4, 128), x, weight)
    assert library.emulation_bad_reads() == 0


@pytest.mark.parametrize("change", ["bits", "group_size", "rows"])
def test_other_products_take_the_default(change: str, kernels: PackedCudaKernels) -> None:
    bits, group_size, n = {"bits": (5, 32, 2), "group_size": (4, 20, 2), "rows": (4, 32, 300)}[change]
    weight = Weight(bits, 8, 64, group_size, torch.float32, symmetric=False)
    x = torch.randn(n, 64)
    assert_product(kernels.packed_linear(x, *weight.tensors(), bits, group_size), x, weight)


@pytest.mark.parametrize("layout", ["stream", "words", "planes"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits: int, layout: str, kernels: PackedCudaKernels) -> None:
    for columns in (0, 1, 31, 33, 97, 132):
        codes = torch.randint(0, 256, (3, columns), dtype=torch.uint8)
        words = kernels.pack(codes, bits, layout)
        assert torch.equal(words, _default_pack.pack(codes, bits, layout))
        assert torch.equal(kernels.unpack(words, bits, columns, layout), codes & (2**bits - 1))


def test_no_rows(kernels: PackedCudaKernels) -> None:
    weight = Weight(4, 8, 64, 32, torch.float32, symmetric=False)
    assert kernels.packed_linear(torch.zeros(0, 64), *weight.tensors(), 4, 32).shape == (0, 8)
    assert kernels.pack(torch.zeros(0, 5, dtype=torch.uint8), 4, "planes").shape == (0, 4)


def test_wrong_arguments_are_refused(kernels: PackedCudaKernels) -> None:
    weight = Weight(4, 8, 64, 32, torch.float32, symmetric=False)
    with pytest.raises(ValueError, match="expected"):
        kernels.packed_linear(torch.zeros(2, 96), *weight.tensors(), 4, 32)
    with pytest.raises(ValueError, match="expected"):
        kernels.unpack(weight.words, 4, 96, "planes")
    with pytest.raises(TypeError, match="expected"):
        kernels.pack(weight.words, 4, "planes")
