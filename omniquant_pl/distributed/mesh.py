"""All processes as a mesh: segments of blocks in one direction, shares of the samples in the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from omniquant_pl.distributed.group import Group
from omniquant_pl.distributed.segments import share_out

__all__ = ["Mesh"]

_PATIENCE = timedelta(days=30)
"""A segment may wait for the others for hours; that a process is dead is noticed otherwise."""


@dataclass(frozen=True)
class Mesh:
    """The groups that one process is in.

    Attributes:
        world: All processes.
        data: Those that calibrate the same segments, each with a share of the samples.
        segments: Those that have the same share of the samples, one for each segment that is calibrated at a time.
    """

    world: Group = field(default_factory=Group)
    data: Group = field(default_factory=Group)
    segments: Group = field(default_factory=Group)

    @classmethod
    def connected(cls, segments: int | None) -> Mesh:
        """Make the groups; every process of the job calls it.

        Args:
            segments: Segments that there are; ``None`` for as many as processes. Of fewer processes each has several.

        Raises:
            ConfigurationError: If the processes cannot be shared out evenly.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        columns, _ = share_out(size if segments is None else segments, size)
        row, column = divmod(rank, columns)
        world = _connect([list(range(size))])
        data = _connect([list(range(first, first + columns)) for first in range(0, size, columns)])
        others = _connect([list(range(first, size, columns)) for first in range(columns)])
        return cls(Group(rank, size, world), Group(column, columns, data), Group(row, size // columns, others))


def _connect(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Make groups of processes and return the one that this process is in."""
    own: dist.ProcessGroup | None = None
    for ranks in groups:
        made = dist.new_group(ranks, timeout=_PATIENCE)
        own = made if dist.get_rank() in ranks else own
    return own
