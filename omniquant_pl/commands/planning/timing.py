"""What a block takes: measured on this machine's device, or estimated for another."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.calibration.engine import Engine
from omniquant_pl.commands.planning.cost import BlockTimes
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import observe_inputs, observe_samples

__all__ = ["estimated_times", "measured_times"]

_T = TypeVar("_T")

_REPEATS = 3
_STEP_PRODUCTS = 3
"""Products of a step over those of a forward pass: output, gradient of the input, gradient of the weights."""
_WEIGHT_PASSES = 20
"""Times that a step reads or writes a block's weights in float32 to transform and fake-quantize them and back."""
_DISK = 2e9
"""Bytes a second that a block is read with."""


def measured_times(
    model: OmniQuantModel, tokens: Tensor, batch_size: int, index: int, engine: Engine
) -> tuple[BlockTimes, int]:
    """Read one block, runs it, lets it learn for some steps, and fold it.

    Args:
        model: The model and its settings.
        tokens: Token ids ``[samples, tokens]``.
        batch_size: Samples of a step.
        index: Which block.
        engine: Where to compute.

    Returns:
        Its times, and how many numbers it learns.
    """
    source, device = model.source, engine.device
    batch = tokens[:batch_size]
    with source.on(device):
        call = source.calls(tokens.shape[1])[index]
        hidden = source.embed(batch).float()
    linears = source.layouts[index].linears
    read, tensors = _timed(lambda: source.block_tensors(index), device, 1)
    original = source.make_block(index, tensors).to(device)
    with torch.no_grad(), observe_inputs(original, linears) as inputs, observe_samples(original, linears) as samples:
        target = call(original, hidden).float()
    part = hidden[: engine.micro_batch_size]
    with torch.no_grad(), engine.context():
        forward, _ = _timed(partial(call, original, part), device)
    rows = {name: found.rows for name, found in samples.items()}
    block = model.block(index, tensors, call, inputs, rows, device)
    size = engine.micro_batch_size
    module = BlockModule([block], model.rates, steps=_REPEATS, micro_batch_size=size, sums_exactly=size is not None).to(
        device
    )
    configured = module.configure_optimizers() if list(module.parameters()) else None
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    step = 0.0
    module.on_fit_start()
    if optimizer is not None:
        step, _ = _timed(partial(_step, module, optimizer, (hidden, target), engine), device)
    module.on_fit_end()
    fold, _ = _timed(block.fold, device, 1)
    nearest, _ = _timed(partial(model.round_to_nearest, index, tensors, call), device, 1)
    factors = sum(factor.numel() for factor in module.parameters())
    return BlockTimes(read, forward / len(part), step / len(batch), fold + nearest), factors


def _step(module: BlockModule, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], engine: Engine) -> None:
    optimizer.zero_grad()
    with engine.context():
        loss = module.training_step(batch, 0)
    loss.backward()
    optimizer.step()


def _timed(run: Callable[[], _T], device: torch.device, repeats: int = _REPEATS) -> tuple[float, _T]:
    """Seconds of the fastest of some runs, after one that does not count if there are several, and its result."""
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        _wait(device)
        started = time.perf_counter()
        result = run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[repeats > 1 :]), result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def estimated_times(weights: int, tokens: int, teraflops: float, bandwidth: float) -> BlockTimes:
    """Estimates a block by its products and by how often its weights pass through the memory.

    Args:
        weights: Of its linears.
        tokens: Of a sample; a step has one sample.
        teraflops: Products that the device sustains, in 10^12 operations a second.
        bandwidth: Memory that it reads or writes, in 10^9 bytes a second.
    """
    forward = 2 * weights * tokens / (teraflops * 1e12)
    through = 4 * weights / (bandwidth * 1e9)
    fold = 2 * _WEIGHT_PASSES * 4 * weights / 5e9  # on the CPU
    return BlockTimes(2 * weights / _DISK, forward + through, _STEP_PRODUCTS * forward + _WEIGHT_PASSES * through, fold)
