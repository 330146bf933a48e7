"""The loss of a batch together with its gradients, computed in parts if they do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["exact_dtype", "gradients_by_micro_batch", "split_batch", "with_gradients"]


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return what sums are kept in that should not depend on their order: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def split_batch(batch: Sequence[Tensor], micro_batch_size: int | None) -> list[tuple[Tensor, ...]]:
    """Return some samples of a batch at a time, ``None`` for all; an empty batch has no part."""
    samples = len(batch[0])
    return list(zip(*(tensor.split(micro_batch_size or samples) for tensor in batch), strict=True)) if samples else []


def gradients_by_micro_batch(
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    batch: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    micro_batch_size: int | None = None,
    samples: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of some samples and its gradients, which are computed part by part.

    Args:
        loss_of: Mean loss of some samples.
        batch: Tensors ``[samples, ...]``; there may be no sample.
        parameters: What the loss depends on.
        micro_batch_size: Samples of a part; ``None`` for all.
        samples: How many samples the mean is over, if some of them are elsewhere.
        dtype: Of the sums over the parts. In float64 they are, for what float32 can tell, those of any order.

    Returns:
        The loss, and for each parameter what the samples contribute to the gradient of the mean; ``None`` for one that
        no sample has reached.
    """
    own = len(batch[0])
    total = torch.zeros((), device=batch[0].device, dtype=dtype)
    gradients: list[Tensor | None] = [None] * len(parameters)
    for part in split_batch(batch, micro_batch_size):
        loss = loss_of(part) * (len(part[0]) / (samples or own))
        for position, gradient in enumerate(_gradients(loss, parameters)):
            gradients[position] = _sum(gradients[position], gradient, dtype)
        total += loss.detach()
    return total, gradients


def with_gradients(value: Tensor, gradients: list[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return a value whose ``backward`` gives parameters known gradients; the list is emptied meanwhile."""
    known: Tensor = _Computed.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call]
    return known


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    with torch.autocast(loss.device.type, enabled=False):  # a training step has it on, a backward pass has not
        return torch.autograd.grad(loss, parameters, allow_unused=True)


def _sum(one: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if other is None:
        return one
    return other.to(dtype) if one is None else one + other  # not in place: two parameters may share a tensor


class _Computed(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return value.float()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        known, context.gradients = context.gradients, None
        for position, found in enumerate(known):  # each in the place of what it is made of: never two copies of all
            known[position] = None if found is None else found.float() * gradient
        return (None, None, *known)
