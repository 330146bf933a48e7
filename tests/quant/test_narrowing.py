"""Casts that refuse values which the dtype does not hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniquant_pl.quant.narrowing import NarrowDtypeError, Narrowing

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(DTYPES))
def test_a_value_is_refused_where_the_dtype_rounds_it_to_infinity(value: float, dtype: torch.dtype) -> None:
    tensor, narrowing = torch.tensor([0.0, value]), Narrowing(dtype, "key")
    if bool(tensor.to(dtype).isfinite().all()):
        assert torch.equal(narrowing.cast("a", tensor), tensor.to(dtype))
        return
    with pytest.raises(NarrowDtypeError, match=r"^key: a has the value .*, beyond b?float16 ") as caught:
        narrowing.cast("a", tensor)
    assert bool(tensor.to(getattr(torch, caught.value.holding)).isfinite().all())


@pytest.mark.parametrize(
    ("value", "holding"), [(65520.0, "bfloat16"), (-7e4, "bfloat16"), (3e38, "bfloat16"), (3.4e38, "float32")]
)
def test_the_narrowest_dtype_that_holds_it_is_named(value: float, holding: str) -> None:
    expected = rf"^key: a has the value {value:.6g}, beyond float16 \(at most 65504\), why; take {holding}$"
    with pytest.raises(NarrowDtypeError, match=expected.replace("+", r"\+")):
        Narrowing(torch.float16, "key", ", why", "take {}").cast("a", torch.tensor([1.0, value, 2.0]))


def test_values_that_are_rounded_are_refused_only_where_they_must_not_be() -> None:
    half, tensor = Narrowing(torch.float16, "key"), torch.tensor([0.5, 2.0**-30])
    assert torch.equal(half.cast("a", tensor), tensor.half())
    with pytest.raises(NarrowDtypeError, match=r"a has the value 9\.31323e-10, which float16 rounds; bfloat16 holds"):
        half.cast("a", tensor, is_exact=True)


def test_integers_stay() -> None:
    tensor = torch.tensor([100_000])
    assert torch.equal(Narrowing(torch.float16, "key").cast("a", tensor), tensor)


@pytest.mark.parametrize(("scale", "largest"), [(250.0, 3750.0), (4000.0, 6e4), (5000.0, 7.5e4)])
def test_weights_by_their_largest_value(scale: float, largest: float) -> None:
    """Scales alone decide where 256 of the largest are in range."""
    seen = []

    def dequantize() -> torch.Tensor:
        seen.append(scale)
        return torch.tensor([0.0, largest])

    half = Narrowing(torch.float16, "key")
    if largest > 65504:
        with pytest.raises(NarrowDtypeError, match=r"w has the value 75000"):
            half.check_weight("w", torch.tensor([scale]), dequantize)
    else:
        half.check_weight("w", torch.tensor([scale]), dequantize)
    assert bool(seen) is (scale > 255)


def test_what_has_to_be_exact_is_said_to_be_held_where_it_is_exact() -> None:
    third = torch.tensor([1 / 3])  # float32's; bfloat16 rounds it, as float16 does
    with pytest.raises(NarrowDtypeError, match="which float16 rounds; float32 holds it") as caught:
        Narrowing(torch.float16, "key").cast("a", third, is_exact=True)
    assert caught.value.holding == "float32"
