"""What a calibration on a cluster takes, from what one block takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniquant_pl.calibration.engine import hidden_state_count
from omniquant_pl.distributed import balanced_segments, share_out
from omniquant_pl.errors import ConfigurationError

__all__ = ["BlockTimes", "Job", "Plan", "plan"]

_PASSES = 4
"""Passes over the samples without gradients: target, initial loss, output, and that of round-to-nearest."""
_COPIES = 5
"""Of a block's weights while it learns: original, transformed, fake-quantized, their gradient, and one in between."""
_OVERHEAD = 1_000_000_000
"""Bytes of a process before it holds anything: libraries and what surrounds the blocks of a small model."""


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that the costliest block takes on one device."""

    read: float
    """To read its weights."""
    forward: float
    """A sample through it, without gradients."""
    step: float
    """A sample of an optimizer step."""
    fold: float
    """To fold it, and its round-to-nearest."""


@dataclass(frozen=True)
class Job:
    """What is to be calibrated."""

    costs: tuple[int, ...]
    """Weights of every block's linears."""
    samples: int
    tokens: int
    """Of a sample."""
    channels: int
    """Of the hidden states."""
    batch_size: int
    epochs: int
    stream_bytes: int = 4
    """Of a stored number between blocks."""
    window: int = 1
    augmented: bool = False
    factors: int = 0
    """Learned numbers of a block."""
    gradient_bytes: int = 4
    """Of a number's gradient, as it is sent."""
    other_weights: int = 0
    """Around the blocks."""
    stitch_epochs: int = 0
    stitch_blocks: int | None = 1


@dataclass(frozen=True)
class Plan:
    """How a job is shared out, and what it takes. Bytes and seconds."""

    segments: int
    processes_per_segment: int
    longest_segment: int
    """Blocks of the longest segment."""
    hours: float
    hours_of_inputs: float
    """Of those, for the inputs of the segments."""
    hours_of_one_device: float
    efficiency: float
    """One device's time over the time of all devices."""
    block_memory: int
    """Of a device, for the block while it learns."""
    stream_memory: int
    """Hidden states of a process, on the device as far as they fit there."""
    host_memory: int
    """Of all processes of a node, where streams are in host memory and devices have none of their own."""
    disk: int
    network: int
    """That one process sends."""


def plan(job: Job, times: BlockTimes, devices: int, nodes: int, segments: int | None = None) -> Plan:
    """Share a job out.

    Args:
        job: What is to be calibrated.
        times: What its costliest block takes on one of the devices.
        devices: Of a node.
        nodes: Number of nodes.
        segments: Number of segments; ``None``: as many as blocks and processes allow.

    Raises:
        ConfigurationError: If it cannot be shared out; it names the setting.
    """
    size = devices * nodes
    if devices < 1 or nodes < 1:
        key, given = ("devices", devices) if devices < 1 else ("nodes", nodes)
        raise ConfigurationError(key, f"{given} is not a positive number")
    if segments is None:
        segments = max(count for count in range(1, size + 1) if size % count == 0 and count <= len(job.costs))
    if segments < 1:
        raise ConfigurationError("segments", f"{segments} is not a positive number")
    share, in_turn = share_out(segments, size, "segments")
    if job.batch_size % share:
        message = f"{job.batch_size} samples of a step cannot be shared out among the {share} processes of a segment"
        raise ConfigurationError("data.batch_size", f"{message}; take a multiple, or more segments")
    if segments > 1 and job.samples % size:
        message = f"{job.samples} samples cannot be shared out evenly among {size} processes; take a multiple of {size}"
        raise ConfigurationError("data.samples", message)
    parts = balanced_segments(job.costs, segments)
    blocks = [_seconds(job, times, cost, share) for cost in job.costs]
    alone = sum(_seconds(job, times, cost, 1) for cost in job.costs)
    inputs = _input_seconds(job, times, parts[-1].start, size)
    total = inputs + _longest([sum(blocks[index] for index in part) for part in parts], in_turn)
    if job.stitch_epochs and segments > 1:
        stitched = [_stitch_seconds(job, times, part, share) for part in parts[1:]]
        total += 2 * inputs + _longest([0.0, *stitched], in_turn)
    block_memory = _COPIES * 4 * job.window * max(job.costs)
    stream_memory = _stream_memory(job, share, hidden_state_count(job.window, segments, in_turn))
    return Plan(
        segments=segments,
        processes_per_segment=share,
        longest_segment=max(map(len, parts)),
        hours=total / 3600,
        hours_of_inputs=inputs / 3600,
        hours_of_one_device=alone / 3600,
        efficiency=alone / (size * total),
        block_memory=block_memory,
        stream_memory=stream_memory,
        host_memory=devices * (block_memory + stream_memory + _OVERHEAD),
        disk=4 * (sum(job.costs) + job.other_weights + len(job.costs) * job.factors),
        network=_sent(job, segments - in_turn, size, share, max(map(len, parts))),
    )


def _longest(segments: Sequence[float], in_turn: int) -> float:
    """Of the process that takes longest; each has so many consecutive segments."""
    return max(sum(segments[first : first + in_turn]) for first in range(0, len(segments), in_turn))


def _seconds(job: Job, times: BlockTimes, cost: int, share: int, epochs: int | None = None) -> float:
    """Return a block in the hands of so many processes."""
    epochs = job.epochs if epochs is None else epochs
    passes = _PASSES + job.augmented
    of_sample = passes * times.forward + epochs * times.step * job.window
    return cost / max(job.costs) * (times.read + times.fold + job.samples / share * of_sample)


def _input_seconds(job: Job, times: BlockTimes, blocks: int, size: int) -> float:
    """Return the pass over the blocks in front of the last segment: the next is read while one is computed."""
    scale = sum(job.costs[:blocks]) / max(job.costs)
    return scale * max(times.read, times.forward * job.samples / size)


def _stitch_seconds(job: Job, times: BlockTimes, blocks: range, share: int) -> float:
    count = len(blocks) if job.stitch_blocks is None else job.stitch_blocks
    learned = sum(_seconds(job, times, job.costs[index], share, job.stitch_epochs) for index in blocks[:count])
    return learned + sum(_seconds(job, times, job.costs[index], share, 0) for index in blocks[count:])


def _stream_memory(job: Job, share: int, streams: int) -> int:
    return streams * (job.samples // share) * job.tokens * job.channels * job.stream_bytes


def _sent(job: Job, others: int, size: int, share: int, blocks: int) -> int:
    """Return the bytes sent: hidden states of other processes' segments, and gradients where samples are shared."""
    hidden = job.samples * job.tokens * job.channels * 4 // size * others
    passes = 3 if job.stitch_epochs else 1
    steps = -(-job.samples // job.batch_size) * job.epochs * blocks
    return passes * hidden + (steps * job.factors * job.gradient_bytes * 2 if share > 1 else 0)
