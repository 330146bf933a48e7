"""Several processes: who shares what with whom, and what Lightning is told of it."""

from omniquant_pl.distributed.agreement import refuse_unequal
from omniquant_pl.distributed.group import FailedElsewhere, Group
from omniquant_pl.distributed.statistics import add_moments, join_ranges, join_samples
from omniquant_pl.distributed.strategy import DataParallelStrategy, GroupStrategy

__all__ = [
    "DataParallelStrategy",
    "FailedElsewhere",
    "Group",
    "GroupStrategy",
    "add_moments",
    "join_ranges",
    "join_samples",
    "refuse_unequal",
]
