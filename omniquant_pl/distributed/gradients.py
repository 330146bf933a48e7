"""The sum of gradients over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omniquant_pl.distributed.group import Group

__all__ = ["add_gradients"]

_LARGE = 1 << 20
"""Elements of a gradient that is reduced alone; smaller ones travel together."""


def add_gradients(
    loss: Tensor, gradients: list[Tensor | None], parameters: Sequence[Tensor], group: Group
) -> tuple[Tensor, list[Tensor | None]]:
    """Add up what the samples of each process contribute to the loss of a step and to its gradients.

    A process that has no gradient of a parameter counts with zero, as no sample of its share has reached that expert;
    where none has one, there is none, so that the optimizer leaves the parameter alone, as it would in one process.

    Args:
        loss: This process's part, of no dimension.
        gradients: This process's parts, in the dtype of the loss; taken out of the list one by one.
        parameters: What they are the gradients of; in the same order in all processes.
        group: The processes.

    Returns:
        Loss and gradients of the whole, the same bits in all processes.
    """
    if group.size == 1:
        return loss, gradients
    # On the CPU whatever the device: asking a GPU would wait for it.
    reached = group.maximum(torch.tensor([gradient is not None for gradient in gradients], dtype=torch.uint8))
    totals: list[Tensor | None] = [None] * len(gradients)
    small: dict[int, Tensor] = {}
    for position in reached.nonzero().flatten().tolist():
        gradient, gradients[position] = gradients[position], None
        if gradient is None:
            gradient = torch.zeros_like(parameters[position], dtype=loss.dtype)
        if gradient.numel() < _LARGE:
            small[position] = gradient
        else:  # a copy, as two parameters may share a gradient
            totals[position] = group.sum(gradient.clone(memory_format=torch.contiguous_format))
    together = group.sum(torch.cat([loss.flatten(), *(gradient.flatten() for gradient in small.values())]))
    total, *parts = together.split([1, *(gradient.numel() for gradient in small.values())])
    for (position, gradient), part in zip(small.items(), parts, strict=True):
        totals[position] = part.view_as(gradient)
    return total[0], totals
