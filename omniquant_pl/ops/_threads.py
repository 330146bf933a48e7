"""Splits the rows of a large tensor over threads; small tensors run where they are."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["MIN_PARALLEL_ELEMENTS", "split_rows"]

MIN_PARALLEL_ELEMENTS = 1 << 20  # handing over costs 50 µs, this many elements 200 µs


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="omniquant")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def split_rows(run: Callable[[int, int], None], rows: int, columns: int) -> None:
    """Call `run(begin, end)` over all rows, in parallel where that pays.

    The chunks do not depend on each other, so the result is the same for every thread count.

    Args:
        run: works on the rows [begin, end) and releases the interpreter lock.
        rows: number of rows.
        columns: elements a row.
    """
    chunks = min(torch.get_num_threads(), rows) if rows * columns >= MIN_PARALLEL_ELEMENTS else 1
    if chunks <= 1:
        run(0, rows)
        return
    ends = [rows * i // chunks for i in range(chunks + 1)]
    others = [_pool().submit(run, ends[i], ends[i + 1]) for i in range(1, chunks)]
    run(ends[0], ends[1])
    for other in others:
        other.result()
