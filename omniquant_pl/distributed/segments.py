"""How blocks are shared out in contiguous segments."""

from __future__ import annotations

from collections.abc import Sequence

from omniquant_pl.errors import ConfigurationError

__all__ = ["balanced_segments", "share_out"]


def balanced_segments(costs: Sequence[int], count: int) -> list[range]:
    """Share consecutive blocks out so that the costliest segment costs least.

    Args:
        costs: Cost of every block.
        count: Number of segments.

    Raises:
        ConfigurationError: If there are fewer blocks than segments.
    """
    if not 0 < count <= len(costs):
        message = f"{count} segments of {len(costs)} blocks; every segment needs one"
        raise ConfigurationError("trainer.strategy.segments", message)
    # best[end]: the least cost of the costliest of `number` segments of the blocks before `end`, and their borders.
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {end: (sums[end], [0]) for end in range(1, len(costs) + 1)}
    for number in range(2, count + 1):
        best = {
            end: min(
                (max(best[start][0], sums[end] - sums[start]), [*best[start][1], start])
                for start in best
                if start < end
            )
            for end in range(number, len(costs) + 1)
        }
    starts = best[len(costs)][1]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(costs)], strict=True)]


def share_out(segments: int, processes: int, key: str = "trainer.strategy.segments") -> tuple[int, int]:
    """Return how many processes share the samples of a segment, and how many segments each calibrates in turn.

    Args:
        segments: Number of segments.
        processes: Number of processes.
        key: The setting that the segments are from.

    Raises:
        ConfigurationError: If neither number divides the other.
    """
    if processes % segments and segments % processes:
        message = (
            f"{segments} segments cannot be shared out evenly among {processes} processes; one must divide the other"
        )
        raise ConfigurationError(key, message)
    return max(1, processes // segments), max(1, segments // processes)
