"""Second moments and samples of inputs against numpy on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omniquant_pl.quant import dynamic_fake_quantize
from omniquant_pl.quant.moments import InputMoment, InputSample, observe_moments, observe_samples


class Experts(nn.Module):
    """Two linears in a row, one that never runs, and one that is given no token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)
        self.idle, self.empty = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        self.empty(hidden[:0])
        return self.second(self.first(hidden))


NAMES = ("first", "second", "idle", "empty")


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 5, 6, generator=generator) for size in (3, 1, 2)]


def numpy_moment(values: Tensor) -> np.ndarray:
    rows = values.detach().double().numpy().reshape(-1, values.shape[-1])
    return sum(np.outer(row, row) for row in rows)


def test_moments_are_those_of_all_tokens(batches: list[Tensor]) -> None:
    module = Experts()
    with observe_moments(module, NAMES) as moments, torch.no_grad():
        for batch in batches:
            module(batch)
    together = torch.cat(batches)
    assert set(moments) == {"first", "second"}
    assert np.allclose(moments["first"].second.numpy(), numpy_moment(together), atol=1e-5)
    assert np.allclose(moments["second"].second.numpy(), numpy_moment(module.first(together)), atol=1e-5)
    assert moments["first"].tokens == moments["second"].tokens == 30


@pytest.mark.parametrize("observe", [observe_moments, observe_samples])
def test_nothing_is_recorded_after_the_context(observe: Callable[..., Any], batches: list[Tensor]) -> None:
    module = Experts()
    with pytest.raises(RuntimeError, match="stop"), observe(module, NAMES) as found:
        raise RuntimeError("stop")
    module(batches[0])
    assert found == {}


def test_a_transform_stands_for_what_the_linear_does_with_its_input(batches: list[Tensor]) -> None:
    module = Experts()
    with observe_moments(module, ["first"], lambda values: dynamic_fake_quantize(values, 4)) as moments:
        module(batches[0])
    values = batches[0].double().numpy().reshape(-1, 6)
    low, high = values.min(1, keepdims=True).clip(max=0), values.max(1, keepdims=True).clip(min=0)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    quantized = (np.clip(np.round(values / scale) + zero, 0, 15) - zero) * scale
    assert np.allclose(moments["first"].second.numpy(), quantized.T @ quantized, atol=1e-4)


def test_autocast_and_half_inputs_do_not_round_the_moment() -> None:
    values = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    moment, of_halves = InputMoment(8), InputMoment(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moment.add(values)
        of_halves.add(values.bfloat16())
    assert moment.second.dtype == of_halves.second.dtype == torch.float32
    assert np.allclose(moment.second.numpy(), numpy_moment(values), rtol=1e-5, atol=1e-5)
    assert np.allclose(of_halves.second.numpy(), numpy_moment(values.bfloat16().float()), rtol=1e-5, atol=1e-5)


def test_a_sample_of_few_tokens_is_all_of_them(batches: list[Tensor]) -> None:
    module = Experts()
    with observe_samples(module, NAMES, size=100) as samples, torch.no_grad():
        for batch in batches:
            module(batch)
    assert set(samples) == {"first", "second"}
    assert torch.equal(samples["first"].rows, torch.cat(batches).view(-1, 6))


def test_two_inputs_are_sampled_at_the_same_tokens(batches: list[Tensor]) -> None:
    module = Experts()
    with observe_samples(module, ["first", "second"], size=7, seed=3) as samples, torch.no_grad():
        for batch in batches:
            module(batch)
        assert samples["first"].rows.shape == (7, 6)
        assert torch.allclose(samples["second"].rows, module.first(samples["first"].rows), atol=1e-6)


def test_every_token_is_as_likely_and_none_is_taken_twice() -> None:
    batches = torch.arange(40.0).view(-1, 1).split([1, 25, 4, 10])
    counts, together = np.zeros(40), np.zeros((40, 40))
    for seed in range(2000):
        sample = InputSample(1, 8, seed)
        for batch in batches:
            sample.add(batch.half())
        assert sample.rows.dtype == torch.float32
        chosen = sample.rows.flatten().int().numpy()
        assert len(set(chosen)) == 8
        counts[chosen] += 1
        together[np.ix_(chosen, chosen)] += 1
    # Binomial: 2000 draws with 8/40, and pairs with 8*7 / (40*39); five standard deviations.
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)
    pairs, likely = together[~np.eye(40, dtype=bool)], 56 / 1560
    assert np.abs(pairs - 2000 * likely).max() < 5 * np.sqrt(2000 * likely * (1 - likely))


def test_a_sample_holds_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        InputSample(4, 0)
