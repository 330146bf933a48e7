"""Several processes: who shares what with whom, and what Lightning is told of it."""

from omniquant_pl.distributed.agreement import refuse_differing, refuse_separate_folders, refuse_unequal
from omniquant_pl.distributed.gradients import add_gradients
from omniquant_pl.distributed.group import FailedElsewhereError, Group
from omniquant_pl.distributed.logs import mark_logs
from omniquant_pl.distributed.mesh import Mesh
from omniquant_pl.distributed.segments import balanced_segments, share_out
from omniquant_pl.distributed.statistics import add_moments, join_ranges, join_samples
from omniquant_pl.distributed.strategy import BlockParallelStrategy, DataParallelStrategy, GroupStrategy
from omniquant_pl.distributed.watch import Watch

__all__ = [
    "BlockParallelStrategy",
    "DataParallelStrategy",
    "FailedElsewhereError",
    "Group",
    "GroupStrategy",
    "Mesh",
    "Watch",
    "add_gradients",
    "add_moments",
    "balanced_segments",
    "join_ranges",
    "join_samples",
    "mark_logs",
    "refuse_differing",
    "refuse_separate_folders",
    "refuse_unequal",
    "share_out",
]
