"""The mean of gradients over the processes of a group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from omniquant_pl.distributed.group import Group

__all__ = ["average_gradients"]

_LARGE = 1 << 20
"""Elements of a gradient that is reduced where it is; smaller ones travel together."""


def average_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Replaces the gradients by their means over a group.

    A process that has none for a parameter counts with zero, as no sample of its share has reached that expert; where
    none has one, there is none, so that the optimizer leaves the parameter alone, as it would in one process.

    Args:
        parameters: The same in all processes, in the same order.
        group: The processes.
    """
    if group.size == 1:
        return
    found = list(parameters)
    # On the CPU whatever the device: asking a GPU would wait for it.
    reached = group.maximum(torch.tensor([parameter.grad is not None for parameter in found], dtype=torch.uint8))
    gradients = [
        _gradient(parameter) for parameter, is_reached in zip(found, reached.tolist(), strict=True) if is_reached
    ]
    small = [gradient for gradient in gradients if gradient.numel() < _LARGE]
    for gradient in gradients:
        if gradient.numel() >= _LARGE:
            group.sum(gradient).div_(group.size)
    if small:
        means = group.sum(torch.cat([gradient.flatten() for gradient in small])).div_(group.size)
        for gradient, mean in zip(small, means.split([gradient.numel() for gradient in small]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
