"""Packing against Python's integers: a row of codes is one long number."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from omniquant_pl import ops
from omniquant_pl.ops import _default_pack
from omniquant_pl.ops._cpu import cpu_kernels

KERNELS = cpu_kernels()
needs_library = pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built")
LAYOUTS = ["stream", "words", "planes"]
WIDTHS = range(1, 9)
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
COLUMNS = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 255, 320, 509]))


def words_of(number: int, count: int) -> list[int]:
    """A number as `count` little-endian signed 32-bit words."""
    words = [number >> (32 * i) & 0xFFFFFFFF for i in range(count)]
    assert number >> (32 * count) == 0
    return [word - (1 << 32) if word >> 31 else word for word in words]


def stream(codes: list[int], bits: int) -> list[int]:
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return words_of(number, -(-len(codes) * bits // 32))


def in_words(codes: list[int], bits: int) -> list[int]:
    each = 32 // bits
    return [word for begin in range(0, len(codes), each) for word in stream(codes[begin : begin + each], bits)]


def in_planes(codes: list[int], bits: int) -> list[int]:
    padded = codes + [0] * (-len(codes) % 32)
    words: list[int] = []
    for width in PLANES[bits]:
        words += stream([code % 2**width for code in padded], width)
        padded = [code >> width for code in padded]
    assert not any(padded)
    return words


REFERENCE = {"stream": stream, "words": in_words, "planes": in_planes}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, str]:
    """Codes, width and layout."""
    bits, rows, columns = draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 4)), draw(COLUMNS)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=random)
    return codes, bits, draw(st.sampled_from(LAYOUTS))


@pytest.mark.parametrize("kernels", [ops, _default_pack])
@given(case=cases())
def test_words_are_those_of_the_reference(kernels: object, case: tuple[Tensor, int, str]) -> None:
    codes, bits, layout = case
    words = kernels.pack(codes, bits, layout)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.shape == (len(codes), ops.words_per_row(codes.shape[1], bits, layout))
    assert words.tolist() == [REFERENCE[layout](row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("kernels", [ops, _default_pack])
@given(case=cases())
def test_codes_come_back(kernels: object, case: tuple[Tensor, int, str]) -> None:
    codes, bits, layout = case
    rows = [REFERENCE[layout](row, bits) for row in codes.tolist()]
    length = len(REFERENCE[layout]([0] * codes.shape[1], bits))
    words = torch.tensor(rows, dtype=torch.int32).reshape(len(codes), length)
    result = kernels.unpack(words, bits, codes.shape[1], layout)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    assert torch.equal(result, codes)


@pytest.mark.parametrize("kernels", [ops, _default_pack])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_above_the_code_are_dropped(bits: int, layout: str, kernels: object) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)[:, :61]
    expected = [REFERENCE[layout]([code % 2**bits for code in row], bits) for row in codes.tolist()]
    assert kernels.pack(codes, bits, layout).tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_alignment_do_not_matter(layout: str) -> None:
    base = torch.randint(0, 8, (41, 30), dtype=torch.uint8)
    for codes in (base.T, base[:, ::3], base.flatten()[1:1201].view(40, 30), base[1:2].expand(7, 30)):
        words = ops.pack(codes, 3, layout)
        assert words.tolist() == [REFERENCE[layout](row, 3) for row in codes.tolist()]
        apart = torch.stack([words, words], dim=2).flatten(1)[:, ::2]
        assert torch.equal(ops.unpack(apart, 3, codes.shape[1], layout), codes)


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_threads_do_not_change_the_words(bits: int, layout: str) -> None:
    """Large enough to be split over threads."""
    codes = torch.randint(0, 2**bits, (1030, 1031), dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        words = KERNELS.pack(codes, bits, layout)
        assert torch.equal(words, _default_pack.pack(codes, bits, layout))
        assert torch.equal(KERNELS.unpack(words, bits, codes.shape[1], layout), codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_unknown_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 8, got {bits}"):
        ops.pack(torch.zeros(2, 3, dtype=torch.uint8), bits, "stream")


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="stream, words, planes, got 'rows'"):
        ops.pack(torch.zeros(2, 3, dtype=torch.uint8), 4, "rows")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("excess", [-1, 1])
def test_a_wrong_number_of_words_is_refused(layout: str, excess: int) -> None:
    expected = len(REFERENCE[layout]([0] * 77, 3))
    words = torch.zeros(2, expected + excess, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"expected {expected} words for 77 columns .* got {expected + excess}"):
        ops.unpack(words, 3, 77, layout)


def test_negative_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        ops.unpack(torch.zeros(2, 0, dtype=torch.int32), 3, -1, "words")


def test_other_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected codes as torch\.uint8, got torch\.int32"):
        ops.pack(torch.zeros(2, 3, dtype=torch.int32), 4, "stream")
    with pytest.raises(TypeError, match=r"expected words as torch\.int32, got torch\.int64"):
        ops.unpack(torch.zeros(2, 3, dtype=torch.int64), 4, 24, "stream")
    with pytest.raises(ValueError, match=r"got shape \[3\]"):
        ops.pack(torch.zeros(3, dtype=torch.uint8), 4, "stream")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_opcheck(bits: int, layout: str) -> None:
    codes = torch.randint(0, 2**bits, (3, 45), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.omniquant_pl.pack, (codes, bits, layout))
    words = ops.pack(codes, bits, layout)
    torch.library.opcheck(torch.ops.omniquant_pl.unpack, (words, bits, 45, layout))
