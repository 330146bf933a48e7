"""What must be the same in all processes, compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from omniquant_pl.distributed.group import Group
from omniquant_pl.errors import CalibrationError

__all__ = ["refuse_unequal"]


def refuse_unequal(index: int, tensors: Iterable[Tensor], group: Group) -> None:
    """Refuses a block that the processes of a group have folded differently.

    Args:
        index: Position of the block.
        tensors: Its final tensors.
        group: The processes.

    Raises:
        CalibrationError: If they differ in a bit.
    """
    if group.size == 1:
        return
    sums = [int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors]
    if len(set(group.collect(tuple(sums)))) > 1:
        raise CalibrationError(
            f"block {index}: processes have folded it to different weights; nodes need the same kind of processor, and "
            "the same libraries"
        )
