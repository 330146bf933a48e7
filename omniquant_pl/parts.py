"""A batch whose gradients do not fit into memory at once, in parts."""

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
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [_sum(one, other) for one, other in zip(gradients, found, strict=True)]
        total += loss.detach()
    loss_with_gradients: Tensor = _Computed.apply(total, gradients, *parameters)  # type: ignore[no-untyped-call]
    return loss_with_gradients


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


class _Computed(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        scaled = [None if known is None else known * gradient for known in context.gradients]
        return (None, None, *scaled)
