"""The command ``plan``: what a calibration on a cluster will take."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table
from torch import Tensor

from omniquant_pl.commands.planning import BlockTimes, Job, Plan, estimated_times, measured_times, plan, read_skeleton
from omniquant_pl.data import CalibrationData
from omniquant_pl.distributed import BlockParallelStrategy, DataParallelStrategy
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer.block_parallel import block_costs
from omniquant_pl.trainer.block_trainer import BlockTrainer
from omniquant_pl.trainer.checks import check_compile

__all__ = ["plan_run"]


def plan_run(
    trainer: BlockTrainer,
    model: OmniQuantModel,
    datamodule: CalibrationData,
    devices: int = 8,
    nodes: int = 1,
    segments: int | None = None,
    teraflops: float | None = None,
    bandwidth: float = 2000.0,
) -> Plan:
    """Print what a calibration on several devices takes: time, memory, disk, network.

    Args:
        trainer: With the settings of the calibration.
        model: What to calibrate.
        datamodule: What to calibrate on.
        devices: Devices of a node.
        nodes: Number of nodes.
        segments: Segments of blocks; null: those of trainer.strategy, and where that says nothing as many as blocks and
            devices allow.
        teraflops: Estimate for devices that sustain so many 10^12 operations a second, from config.json alone, rather
            than measure a block on this machine's device.
        bandwidth: Of the memory of those devices, in 10^9 bytes a second.

    Returns:
        The plan.

    Raises:
        ConfigurationError: If the calibration cannot be shared out; it names the setting.
    """
    if teraflops is None:
        times, job = _measured(trainer, model, datamodule)
        origin = f"measured on this machine's {trainer.strategy.root_device.type}"
    else:
        for key, value in (("teraflops", teraflops), ("bandwidth", bandwidth)):
            if value <= 0:
                raise ConfigurationError(key, f"{value:g} is not a positive number")
        times, job = _estimated(trainer, model, datamodule, teraflops, bandwidth)
        origin = f"an estimate: {teraflops:g} TFLOP/s and {bandwidth:g} GB/s sustained, nothing was measured"
    result = plan(job, times, devices, nodes, _configured(trainer) if segments is None else segments)
    Console().print(plan_table(result, f"{_devices(devices * nodes)}; {origin}"))
    return result


def _configured(trainer: BlockTrainer) -> int | None:
    """Return the segments that the configuration asks for."""
    if isinstance(trainer.strategy, BlockParallelStrategy):
        return trainer.strategy.segments
    return 1 if isinstance(trainer.strategy, DataParallelStrategy) else None


def _job(trainer: BlockTrainer, model: OmniQuantModel, data: CalibrationData, job: Job) -> Job:
    strategy = trainer.strategy
    if isinstance(strategy, BlockParallelStrategy):
        job = replace(job, stitch_epochs=strategy.stitch_epochs, stitch_blocks=strategy.stitch_blocks)
    return replace(
        job,
        batch_size=data.batch_size,
        gradient_bytes=4 if data.micro_batch_size is None else 8,
        epochs=trainer.epochs_per_block,
        window=model.objective.window.blocks,
        augmented=model.objective.aug_loss,
    )


def _measured(trainer: BlockTrainer, model: OmniQuantModel, data: CalibrationData) -> tuple[BlockTimes, Job]:
    tokens: Tensor = trainer.prepare(model, data)
    check_compile(model, data, trainer.strategy.root_device, trainer.group)
    source, costs = model.source, block_costs(model)
    costliest = costs.index(max(costs))
    engine = trainer.engine(model, tokens, data.micro_batch_size)
    times, factors = measured_times(model, tokens, data.batch_size, costliest, engine)
    others = sum(source.describe(name).elements for name in source.non_block_names)
    stored = model.activation_dtype.itemsize
    job = Job(tuple(costs), len(tokens), tokens.shape[1], source.config.hidden_size, 1, 0, stored)
    return times, replace(_job(trainer, model, data, job), factors=factors, other_weights=others)


def _estimated(
    trainer: BlockTrainer, model: OmniQuantModel, data: CalibrationData, teraflops: float, bandwidth: float
) -> tuple[BlockTimes, Job]:
    found = read_skeleton(model.path)
    tokens = data.sequence_length or min(2048, found.positions)
    groups = sum(_factors(shape, model.scheme.weights.group_size) for shape in found.linears)
    stored = model.activation_dtype_for(found.is_bfloat16).itemsize
    job = Job(
        found.costs, data.samples, tokens, found.channels, 1, 0, stored, factors=groups, other_weights=found.others
    )
    times = estimated_times(max(found.costs), tokens, teraflops, bandwidth)
    return times, _job(trainer, model, data, job)


def _factors(shape: tuple[int, int], group_size: int | None) -> int:
    """Two ends of a linear's clipping for each group."""
    rows, columns = shape
    return 2 * rows * (1 if group_size is None else -(-columns // group_size))


def plan_table(found: Plan, title: str) -> Table:
    """Return a table of what a plan says."""
    table = Table("", "", title=title, show_header=False)
    rows = {
        "segments": f"{found.segments}, the longest of {found.longest_segment} blocks",
        "processes of a segment": str(found.processes_per_segment),
        "calibration": _duration(found.hours),
        "of it, inputs of segments": _duration(found.hours_of_inputs),
        "on one device": _duration(found.hours_of_one_device),
        "efficiency": f"{100 * found.efficiency:.0f} %",
        "memory of a device": f"{_size(found.block_memory)} for a block that learns",
        "hidden states of a process": f"{_size(found.stream_memory)} on the device, the host or in files",
        "memory of a host": f"{_size(found.host_memory)} at most, where all streams are in it",
        "disk, with the exported model": _size(found.disk),
        "network, sent by a process": _size(found.network),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _duration(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
