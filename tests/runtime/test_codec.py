"""Stored codes and zero points, against bits that numpy takes apart."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.runtime.codec import encode, planes_of, stored_tensors, zero_points_of
from omniquant_pl.spec import WeightSpec

BITS = st.integers(2, 8)


def random_weight(spec: WeightSpec, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    size = min(spec.group_size or columns, columns)
    groups, half = -(-columns // size), 2 ** (spec.bits - 1)
    codes = torch.randint(0, 2 * half, (rows, columns), generator=generator)
    scale = torch.rand(rows, groups, generator=generator).to(getattr(torch, spec.scale_dtype)) + 0.1
    if spec.symmetric:
        return QuantizedWeight((codes - half).to(torch.int8), scale, None, size)
    zeros = torch.randint(0, 2 * half, (rows, groups), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes.to(torch.uint8), scale, zeros, size)


def bits_of(words: Tensor) -> np.ndarray:
    return np.unpackbits(words.numpy().astype("<i4").view(np.uint8), bitorder="little")


def values(words: Tensor, width: int) -> np.ndarray:
    bits = bits_of(words)
    return bits[: len(bits) // width * width].reshape(-1, width) @ (1 << np.arange(width))


@given(
    bits=BITS,
    rows=st.integers(1, 5),
    columns=st.integers(1, 100),
    size=st.none() | st.integers(1, 120),
    symmetric=st.booleans(),
)
def test_tensors_are_those_announced(bits: int, rows: int, columns: int, size: int | None, symmetric: bool) -> None:
    spec = WeightSpec(bits, size, symmetric)
    tensors = encode(random_weight(spec, rows, columns), spec)
    announced = stored_tensors(spec, (rows, columns))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == announced
    assert list(tensors) == list(announced)


@given(bits=BITS, rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_zero_points_are_one_stream(bits: int, rows: int, columns: int, seed: int) -> None:
    spec = WeightSpec(bits, group_size=7)
    weight = random_weight(spec, rows, columns, seed)
    assert weight.zero_point is not None
    stream = encode(weight, spec)["zero_point"]
    count = weight.zero_point.numel()
    assert values(stream, bits)[:count].tolist() == weight.zero_point.flatten().tolist()
    assert not bits_of(stream)[count * bits :].any()
    assert torch.equal(zero_points_of(stream, bits, tuple(weight.zero_point.shape)), weight.zero_point)


@given(
    bits=BITS,
    rows=st.integers(1, 4),
    columns=st.integers(1, 70).filter(lambda n: n % 32),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_that_fill_no_planes_are_one_stream(
    bits: int, rows: int, columns: int, symmetric: bool, seed: int
) -> None:
    spec = WeightSpec(bits, symmetric=symmetric)
    weight = random_weight(spec, rows, columns, seed)
    packed = encode(weight, spec)["packed"]
    unsigned = weight.codes.int() + (2 ** (bits - 1) if symmetric else 0)
    assert values(packed, bits)[: rows * columns].tolist() == unsigned.flatten().tolist()
    # What the product reads is what a weight whose rows are filled up with zero codes would store.
    filled = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.uint8)
    filled[:, :columns] = unsigned
    whole = encode(QuantizedWeight(filled, weight.scale, weight.scale.to(torch.uint8), filled.shape[1]), spec)
    assert torch.equal(planes_of(packed, bits, (rows, columns)), whole["packed"])


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_stand_in_planes(bits: int) -> None:
    spec = WeightSpec(bits)
    weight = random_weight(spec, 3, 96)
    packed = encode(weight, spec)["packed"]
    assert planes_of(packed, bits, (3, 96)) is packed
    for row, words in zip(weight.codes.numpy().astype(int), packed, strict=True):
        planes, begin, rest = [], 0, row
        for width in (width for width in (8, 4, 2, 1) if bits & width):
            planes.append(rest % 2**width)
            rest = rest // 2**width
            end = begin + 96 * width // 32
            assert values(words[begin:end], width).tolist() == planes[-1].tolist()
            begin = end
        assert begin == len(words)


@pytest.mark.parametrize(
    ("rows", "columns"), [(192, 192), (512, 192), (192, 512), (100, 100), (77, 333), (1, 4097), (257, 31)]
)
def test_nothing_is_lost_to_padding(rows: int, columns: int) -> None:
    for size, bits, symmetric in product((None, 64, 50), range(2, 9), (False, True)):
        stored = stored_tensors(WeightSpec(bits, size, symmetric), (rows, columns))
        used = sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in stored.values())
        groups = rows * -(-columns // min(size or columns, columns))
        needed = rows * columns * bits + groups * (16 + (0 if symmetric else bits))
        assert needed <= used <= 1.03 * needed, (size, bits, symmetric)
