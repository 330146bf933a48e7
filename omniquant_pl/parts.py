"""The loss of a batch together with its gradients, computed in parts if they do not fit into memory at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["loss_in_parts"]


def loss_in_parts(
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    batch: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    parts: int,
) -> Tensor:
    """Returns the loss of a batch, whose gradients have been computed part by part.

    Args:
        loss_of: Mean loss of some samples.
        batch: Tensors ``[samples, ...]``.
        parameters: What the loss depends on.
        parts: How many parts there are, at most.

    Returns:
        The loss. Its ``backward`` gives the parameters the mean of the parts' gradients, weighted by their samples.
    """
    samples = len(batch[0])
    total = torch.zeros((), device=batch[0].device)
    gradients: list[Tensor | None] = [None] * len(parameters)
    for part in zip(*(tensor.split(math.ceil(samples / parts)) for tensor in batch), strict=True):
        loss = loss_of(part) * (len(part[0]) / samples)
        for position, gradient in enumerate(_gradients(loss, parameters)):
            gradients[position] = _sum(gradients[position], gradient)
        total += loss.detach()
    loss_with_gradients: Tensor = _Computed.apply(total, gradients, *parameters)  # type: ignore[no-untyped-call]
    return loss_with_gradients


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    with torch.autocast(loss.device.type, enabled=False):  # a training step has it on, a backward pass has not
        return torch.autograd.grad(loss, parameters, allow_unused=True)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other  # not in place: two parameters may have been given the same tensor


class _Computed(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        known, context.gradients = context.gradients, None
        for position, found in enumerate(known):  # each in the place of what it is made of: never two copies of all
            known[position] = None if found is None else found * gradient
        return (None, None, *known)
