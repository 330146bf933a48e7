"""Several processes: their groups, what they share, and Lightning strategies for them."""

from omniquant_pl.distributed.agreement import check_agreement, check_equal_blocks, check_shared_folder
from omniquant_pl.distributed.gradients import add_gradients
from omniquant_pl.distributed.group import Group, RemoteRankError
from omniquant_pl.distributed.heartbeat import HeartbeatMonitor
from omniquant_pl.distributed.logs import mark_logs
from omniquant_pl.distributed.mesh import Mesh
from omniquant_pl.distributed.segments import balanced_segments, share_out
from omniquant_pl.distributed.statistics import add_moments, join_ranges, join_samples
from omniquant_pl.distributed.strategy import BlockParallelStrategy, DataParallelStrategy, GroupStrategy

__all__ = [
    "BlockParallelStrategy",
    "DataParallelStrategy",
    "Group",
    "GroupStrategy",
    "HeartbeatMonitor",
    "Mesh",
    "RemoteRankError",
    "add_gradients",
    "add_moments",
    "balanced_segments",
    "check_agreement",
    "check_equal_blocks",
    "check_shared_folder",
    "join_ranges",
    "join_samples",
    "mark_logs",
    "share_out",
]
