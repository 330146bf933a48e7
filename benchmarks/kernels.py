"""What the operators on packed codes reach: packing, and products against torch's on the plain weight.

    python benchmarks/kernels.py --device cpu --threads 1
    python benchmarks/kernels.py --device cuda

All contenders of a table run in turn, round after round; medians are printed, minima beside them. Weights are
read from memory: each contender goes through copies that no cache holds together. On CUDA a pass over the
copies is one graph, timed by events. The share is that of the fastest way to read or copy that was measured.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from omniquant_pl import ops

SHAPES = [(4096, 4096), (4096, 11008)]  # output channels x input channels
CUDA_SHAPES = [*SHAPES, (8192, 28672)]
BATCHES = (1, 4, 16)
GROUP_SIZES = {"g128": 128, "per channel": 1 << 30}
BEYOND_CACHES = 256 << 20
PACKED_SHAPE = (4096, 4096)


@dataclass
class Method:
    """Something that is timed: `run(i)` works on copy `i`."""

    run: Callable[[int], object]
    copies: int
    size: int  # bytes that one run reads, for packing codes
    name: str = ""


@dataclass
class Timing:
    median: float
    shortest: float


class HostClock:
    """Seconds of single runs."""

    def __init__(self, contenders: list[Method]) -> None:
        self.contenders = contenders

    def round(self, index: int) -> list[float]:
        return [self._time(contender, index % contender.copies) for contender in self.contenders]

    def _time(self, contender: Method, copy: int) -> float:
        started = time.perf_counter()
        contender.run(copy)
        return time.perf_counter() - started


class CudaClock:
    """Seconds a run, out of graphs over all copies."""

    def __init__(self, contenders: list[Method]) -> None:
        self.contenders = contenders
        self.graphs = [self._capture(contender) for contender in contenders]

    def round(self, index: int) -> list[float]:
        return [
            self._time(graph) / contender.copies for graph, contender in zip(self.graphs, self.contenders, strict=True)
        ]

    def _capture(self, contender: Method) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            contender.run(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(contender.copies):
                contender.run(copy)
        return graph

    def _time(self, graph: torch.cuda.CUDAGraph) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def measure(contenders: list[Method], device: str, repetitions: int) -> list[Timing]:
    """Return each contender's timing over rounds in which all of them run in turn."""
    clock = CudaClock(contenders) if device == "cuda" else HostClock(contenders)
    clock.round(0)
    rounds = [clock.round(index) for index in range(repetitions)]
    return [Timing(statistics.median(times), min(times)) for times in zip(*rounds, strict=True)]


def copies_of(size: int) -> int:
    return max(2, math.ceil(BEYOND_CACHES / size))


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|---" + "|---:" * (len(head) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def rate(size: int, timing: Timing) -> str:
    """Gigabytes a second, by the median and by the shortest run."""
    return f"{size / timing.median / 1e9:.1f} ({size / timing.shortest / 1e9:.1f})"


def bandwidth(device: str, repetitions: int) -> float:
    """Print what simple passes over memory reach; returns the best, in bytes a second."""
    source = torch.ones(BEYOND_CACHES // 4, device=device)
    target = torch.empty_like(source)
    size = BEYOND_CACHES
    contenders = [
        Method(lambda _: source.sum(), 1, size, "read: sum"),
        Method(lambda _: source.amax(), 1, size, "read: maximum"),
        Method(lambda _: torch.dot(source, target), 1, 2 * size, "read: dot product"),
        Method(lambda _: target.copy_(source), 1, 2 * size, "copy, read and written bytes"),
    ]
    timings = measure(contenders, device, repetitions)
    rows = [[each.name, rate(each.size, timing)] for each, timing in zip(contenders, timings, strict=True)]
    table([f"{size >> 20} MiB of float32", "GB/s"], rows)
    return max(each.size / timing.shortest for each, timing in zip(contenders, timings, strict=True))


def packing(device: str, repetitions: int) -> None:
    """Print gigabytes of codes a second."""
    rows = []
    for layout in ops.LAYOUTS:
        for bits in range(1, 9):
            codes = torch.randint(0, 2**bits, PACKED_SHAPE, dtype=torch.uint8, device=device)
            rows.append([f"{layout}, {bits} bit", *packing_rates(codes, bits, layout, device, repetitions)])
    table([f"GB of codes a second, {PACKED_SHAPE[0]} x {PACKED_SHAPE[1]}", "pack", "unpack"], rows)


def packing_rates(codes: Tensor, bits: int, layout: str, device: str, repetitions: int) -> list[str]:
    words = ops.pack(codes, bits, layout)
    contenders = [
        Method(lambda _: ops.pack(codes, bits, layout), 1, codes.numel()),
        Method(lambda _: ops.unpack(words, bits, codes.shape[1], layout), 1, codes.numel()),
    ]
    return [rate(codes.numel(), timing) for timing in measure(contenders, device, repetitions)]


def plain(x: Tensor, shape: tuple[int, int]) -> Method:
    """Return torch's product with the weight in the dtype of `x`."""
    size = shape[0] * shape[1] * x.element_size()
    first = torch.randn(shape, device=x.device).to(x.dtype)
    weights = [first, *(first.clone() for _ in range(copies_of(size) - 1))]
    return Method(lambda i: F.linear(x, weights[i]), len(weights), size)


class PackedWeights:
    """Copies of a packed weight with random codes, float16 scales and zero points."""

    def __init__(self, shape: tuple[int, int], bits: int, group_size: int, device: str) -> None:
        rows, columns = shape
        groups = math.ceil(columns / group_size)
        words, count = ops.words_per_row(columns, bits, "planes"), rows * groups
        self.bits, self.group_size = bits, group_size
        self.size = 4 * rows * words + 3 * count
        codes = torch.randint(-(2**31), 2**31, (rows, words), device=device).int()
        scale = torch.rand(rows, groups, device=device).half()
        zero_point = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=device)
        self.weights = [(codes.clone(), scale.clone(), zero_point.clone()) for _ in range(copies_of(self.size))]

    def product(self, x: Tensor) -> Method:
        def run(copy: int) -> Tensor:
            return ops.packed_linear(x, *self.weights[copy], self.bits, self.group_size)

        return Method(run, len(self.weights), self.size)


def product_rows(shape: tuple[int, int], n: int, device: str, repetitions: int, peak: float) -> list[list[str]]:
    """Return the table's rows for one shape and batch."""
    wide = torch.randn(n, shape[1], device=device)
    inputs = (wide, wide.bfloat16())
    names, contenders = ["F.linear"], [plain(x, shape) for x in inputs]
    for bits in (2, 3, 4, 8):
        for label, group_size in GROUP_SIZES.items():
            weights = PackedWeights(shape, bits, group_size, device)
            names.append(f"W{bits} {label}")
            contenders += [weights.product(x) for x in inputs]
    timings = measure(contenders, device, repetitions)
    rows = []
    for index, name in enumerate(names):
        row = [f"{shape[0]} x {shape[1]}, batch {n}", name]
        for which in range(len(inputs)):
            own, base = timings[2 * index + which], timings[which]
            speed = contenders[2 * index + which].size / own.median
            row += [f"{own.median * 1e3:.3f} ({own.shortest * 1e3:.3f})", f"{speed / 1e9:.1f}", f"{speed / peak:.0%}"]
            row += [f"{base.median / own.median:.2f} ({base.shortest / own.shortest:.2f})"]
        rows.append(row)
    return rows


def products(device: str, repetitions: int, peak: float) -> None:
    """Print milliseconds, gigabytes of weight a second, the share of the bandwidth and the gain over torch."""
    rows = []
    for shape in CUDA_SHAPES if device == "cuda" else SHAPES:
        for n in BATCHES:
            rows += product_rows(shape, n, device, repetitions, peak)
    columns = ["ms", "GB/s", "share", "times F.linear"]
    head = [f"{dtype} {column}" for dtype in ("float32", "bfloat16") for column in columns]
    table(["out x in", "weight", *head], rows)


def processor() -> str:
    """Return the processor's name and its widest vectors, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    widest = next((name for name in ("avx512f", "avx2") if name in told.get("flags", "").split()), "no AVX2")
    return f"{told.get('model name', platform.machine())} ({widest})"


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"


def main() -> None:
    """Measure and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(f"{name}, torch {torch.__version__}, {options.threads} threads, {load()} before\n")
    print("Medians (the best of all rounds in parentheses).\n")
    peak = bandwidth(options.device, options.repetitions)
    packing(options.device, options.repetitions)
    products(options.device, options.repetitions, peak)
    print(f"{load()} after")


if __name__ == "__main__":
    main()
