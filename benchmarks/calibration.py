"""What a calibration step costs, next to the formulas in plain torch and to what the device's matrix products allow.

    python benchmarks/calibration.py                                # a block of 1024 channels, 512 tokens
    python benchmarks/calibration.py --model FOLDER --tokens 256    # the first block of a LLaMA checkpoint
    python benchmarks/calibration.py --device cuda --shape llama-8b --ways eager compiled compiled-bf16
    python benchmarks/calibration.py --guard                        # against the ratios that are stored

All ways take the same step in turn, round after round, on one thread of the CPU; medians are printed. ``formula`` is
the step as the paper writes it (``formula.py``), ``bare`` the block in float32 without quantization, forward and
backward with gradients of its weights. The rate is that of the step's products alone over the fastest that the device
reached on products of the same sizes. ``--guard`` warns where a ratio is 15 % below the one in ``ratios.json``;
``--store`` puts the ratios of this run there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from contenders import SCHEMES, SHAPES, Problem, Scheme, Step, make_problem, shape_of
from formula import Shape
from ratios import compare_ratios, store_ratios
from torch.profiler import ProfilerActivity, profile

from omniquant_pl.utils.memory import peak_memory

SAMPLES, EPOCHS = 128, 20
PASSES = 4  # over the samples without gradients, for each block
LAYERS = {"llama-7b": 32, "llama-8b": 32, "llama-70b": 80}
KINDS = {
    "products": ("mm", "bmm", "addmm", "gemm", "cutlass", "nvjet"),
    "attention": ("scaled_dot_product", "flash", "fmha"),
    "fake quantization": ("fake_quantize", "row_extremes", "clippedfakequantize"),
    "optimizer": ("optimizer", "adam"),
}


def main() -> None:
    """Read the command line and print a table for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["w4a16g128", "w4a4"])
    parser.add_argument("--shape", choices=SHAPES, default="scaled")
    parser.add_argument("--model", help="a LLaMA checkpoint instead of random weights")
    parser.add_argument("--tokens", type=int, default=256, help="of a sample, with --model")
    ways = ("formula", "eager", "compiled", "bf16", "compiled-bf16", "bare")
    parser.add_argument("--ways", nargs="+", choices=ways, default=["formula", "eager", "compiled", "bare"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=1, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--guard", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    shape = shape_of(arguments.model, arguments.tokens) if arguments.model else SHAPES[arguments.shape]
    name = f"{shape.hidden}/{shape.intermediate}, {shape.heads}/{shape.kv_heads} heads"
    name += f", {arguments.samples} x {shape.tokens} tokens"
    rates = {dtype: product_rate(shape, device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(f"{name}; products at {', '.join(f'{rate / 1e9:.0f} GFLOP/s {d}' for d, rate in rates.items())}")
    ratios = {}
    for scheme in arguments.schemes:
        problem = make_problem(SCHEMES[scheme], shape, device, arguments.model, arguments.samples)
        steps = [make_step(problem, way) for way in arguments.ways]
        seconds = take_turns(steps, arguments.rounds, device)
        print_table(scheme, problem, seconds, rates, None if arguments.model else LAYERS.get(arguments.shape))
        print_shares(steps, device)
        for way in [way for way in seconds if way not in ("formula", "bare")]:
            for base in [base for base in ("formula", "bare") if base in seconds]:
                gains = [one / other for one, other in zip(seconds[base], seconds[way], strict=True)]
                ratios[f"{name}, {scheme}: {base} over {way}"] = median(gains)
    if arguments.store:
        store_ratios(ratios, device, arguments.model)
    if arguments.guard:
        compare_ratios(ratios, device)


def make_step(problem: Problem, way: str) -> Step:
    """One of the ways."""
    if way in ("formula", "bare"):
        return problem.formula() if way == "formula" else problem.bare()
    compiles = way.startswith("compiled")
    if way.endswith("bf16"):
        return problem.ours(way, partial(torch.autocast, problem.hidden.device.type, torch.bfloat16), compiles)
    return problem.ours(way, compiles=compiles)


def take_turns(steps: list[Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every way in every round; two steps before them do not count."""
    losses = {step.name: float(step.run()) for step in steps}
    for way, loss in losses.items():
        plain = losses.get("formula", loss)
        if way != "bare" and abs(loss - plain) > 0.01 * plain:
            raise SystemExit(f"the first loss of {way} is {loss}, that of the formulas {plain}: another step is timed")
    for step in steps:
        step.run()
    seconds: dict[str, list[float]] = {step.name: [] for step in steps}
    for _ in range(rounds):
        for step in steps:
            seconds[step.name].append(timed(step.run, device))
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device has done it."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """For the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Return the fastest of the products of a step with the MLP's weight, in operations a second."""
    hidden = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.intermediate, shape.hidden, device=device, dtype=dtype)
    output = hidden @ weight.t()
    products = (lambda: hidden @ weight.t(), lambda: output @ weight, lambda: output.t() @ hidden)
    best = min(timed(run, device) for _ in range(5) for run in products)
    return 2.0 * shape.tokens * shape.hidden * shape.intermediate / best


def operations(shape: Shape, scheme: Scheme, samples: int) -> float:
    """Of a step's products: outputs, gradients of weights, and of inputs where something is learned in front of them.

    Attention counts half of its square, as it is causal, and its backward two and a half times.
    """
    head = shape.hidden // shape.heads
    first = shape.hidden * (shape.hidden + 2 * shape.kv_heads * head)  # without a transformation nothing is in front
    inputs = shape.weights - (first if scheme.activation_bits is None else 0)
    linears = 2.0 * shape.tokens * (2 * shape.weights + inputs)
    attention = 2.0 * shape.tokens**2 * shape.hidden * 3.5
    return samples * (linears + attention)


def print_table(
    scheme: str,
    problem: Problem,
    seconds: dict[str, list[float]],
    rates: dict[torch.dtype, float],
    layers: int | None,
) -> None:
    """Medians, ratios of the same round, the rate of products, and what a block and a model would take."""
    samples = len(problem.hidden)
    needed = operations(problem.shape, problem.scheme, samples)
    print("\n| way | ms a step | formula / it | it / bare | of the products' rate | 20 epochs of a block |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, found in seconds.items():
        fast = rates[torch.bfloat16 if way.endswith("bf16") else torch.float32]
        block = median(found) * EPOCHS * SAMPLES / samples + median(found) / 3 * PASSES * SAMPLES / samples
        cells = [
            f"{scheme}, {way}",
            f"{1e3 * median(found):.1f}",
            _ratio(seconds.get("formula"), found),
            _ratio(found, seconds.get("bare")),
            f"{100 * needed / median(found) / fast:.0f} %",
            f"{block / 60:.1f} min",
        ]
        print("| " + " | ".join(cells) + " |")
        if layers is not None and way not in ("formula", "bare"):
            print(f"extrapolated, {layers} blocks of {SAMPLES} samples: {layers * block / 60:.1f} min")
    peak = peak_memory(problem.hidden.device)
    print(f"peak memory of all ways together: host {peak['host'] / 1e9:.1f} GB, device {peak['device'] / 1e9:.1f} GB")


def _ratio(above: list[float] | None, below: list[float] | None) -> str:
    if above is None or below is None or above is below:
        return ""
    return f"{median(one / other for one, other in zip(above, below, strict=True)):.2f}"


def print_shares(steps: list[Step], device: torch.device) -> None:
    """How the time of a step is spent; ``host`` is what no operator accounts for."""
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    for step in steps:
        if step.name in ("formula", "bare"):
            continue
        with profile(activities=activities) as found:
            seconds = sum(timed(step.run, device) for _ in range(3))
        spent = dict.fromkeys((*KINDS, "other operators"), 0.0)
        for event in found.key_averages():
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            name = event.key.lower()
            kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), None)
            spent[kind or "other operators"] += own / 1e6
        spent["host"] = max(0.0, seconds - sum(spent.values()))
        print(f"{step.name}: " + ", ".join(f"{kind} {100 * each / seconds:.0f} %" for kind, each in spent.items()))


if __name__ == "__main__":
    main()
