"""Calibration on several machines: what is in front of segments, and what it takes."""

from omniquant_pl.calibration.segment_inputs import segment_inputs
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
    "segment_inputs",
]
