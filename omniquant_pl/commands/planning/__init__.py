"""What a calibration on a cluster takes: sizes, times, and the plan made of them."""

from omniquant_pl.commands.planning.cost import BlockTimes, Job, Plan, plan
from omniquant_pl.commands.planning.sizes import Skeleton, read_skeleton
from omniquant_pl.commands.planning.timing import estimated_times, measured_times

__all__ = [
    "BlockTimes",
    "Job",
    "Plan",
    "Skeleton",
    "estimated_times",
    "measured_times",
    "plan",
    "read_skeleton",
]
