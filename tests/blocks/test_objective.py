"""The divergence of predictions, against torch.distributions in float64 and over all tokens at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from omniquant_pl.blocks.objective import mean_divergence

HEAD = nn.Linear(8, 11, bias=False, dtype=torch.float64)


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 10, 8, generator=random, dtype=torch.float64)
    return output.requires_grad_(), target


@pytest.mark.parametrize("chunk_tokens", [1, 7, 10, 29, 30, 1024])
def test_stretches_give_the_divergence_and_gradient_of_all_tokens(
    states: tuple[Tensor, Tensor], chunk_tokens: int
) -> None:
    output, target = states
    expected = kl_divergence(Categorical(logits=HEAD(target)), Categorical(logits=HEAD(output))).mean()
    (gradient,) = torch.autograd.grad(expected, output)
    found = mean_divergence(HEAD, output, target, chunk_tokens)
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    assert torch.allclose(torch.autograd.grad(found, output)[0], gradient, rtol=1e-4, atol=1e-8)


def test_logits_of_a_stretch_are_all_that_is_held(states: tuple[Tensor, Tensor]) -> None:
    """No saved tensor is as large as the logits of all tokens."""
    output, target = states
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mean_divergence(HEAD, output, target, chunk_tokens=6)
    assert max(sizes, default=0) < 30 * 11


def test_no_stretch_has_more_tokens_than_a_sample(states: tuple[Tensor, Tensor]) -> None:
    """A model with learned positions has none behind the last."""
    lengths: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        lengths.append(hidden.shape[1])
        return HEAD(hidden)

    for chunk_tokens in (1, 7, 29, 1024):
        mean_divergence(head, *states, chunk_tokens)
    assert max(lengths) == states[0].shape[1]
