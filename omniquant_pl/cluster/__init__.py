"""Calibration on several machines: what is in front of segments, and what it takes."""

from omniquant_pl.cluster.borders import border_streams
from omniquant_pl.cluster.measure import estimated_times, measured_times
from omniquant_pl.cluster.plan import BlockTimes, Job, Plan, plan
from omniquant_pl.cluster.skeleton import Skeleton, read_skeleton

__all__ = [
    "BlockTimes",
    "Job",
    "Plan",
    "Skeleton",
    "border_streams",
    "estimated_times",
    "measured_times",
    "plan",
    "read_skeleton",
]
