"""Strategies: Lightning launches the processes and connects them, and then takes each group of them for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from typing_extensions import override

from omniquant_pl.distributed.group import Group
from omniquant_pl.distributed.logs import mark_logs
from omniquant_pl.distributed.mesh import Mesh
from omniquant_pl.errors import ConfigurationError

__all__ = ["BlockParallelStrategy", "DataParallelStrategy", "GroupStrategy"]

_T = TypeVar("_T")

_START = timedelta(minutes=10)
"""Time for all processes to come."""


class GroupStrategy(DDPStrategy):
    """Processes that work on samples of one block each, as one process would.

    Launching, ranks and the process group are those of ``DDPStrategy``. A block is not wrapped: its weights are no
    parameters, and need not be sent at every step, and after a step that did not fit into memory a wrapper could not be
    used any more. The block's module adds up the gradients of the factors. Lightning is told that it is alone, as it
    would synchronise the processes at every step otherwise.

    Args:
        process_group_backend: Of torch.distributed; null: gloo on the CPU, with nccl for tensors on CUDA devices.

    Attributes:
        group: The processes that work on the same thing as this one at the moment.
        mesh: All processes, by segment and share of the samples.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=_START)
        self.group = Group()
        self.mesh = Mesh()

    @property
    def wanted_segments(self) -> int | None:
        """Segments that are calibrated at once, at most; ``None`` for as many as there are processes."""
        return 1

    @contextmanager
    def inside(self, group: Group) -> Iterator[None]:
        """For a while, this process works with the processes of a group only."""
        before, self.group = self.group, group
        rank = rank_zero_only.rank  # type: ignore[attr-defined]
        rank_zero_only.rank = group.rank  # type: ignore[attr-defined]  # a group keeps a log of its own
        try:
            yield
        finally:
            self.group, rank_zero_only.rank = before, rank  # type: ignore[attr-defined]

    @property
    @override
    def world_size(self) -> int:
        return 1

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.group.is_first if dist.is_initialized() else self.global_rank == 0

    @override
    def _get_process_group_backend(self) -> str:
        usual = "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"
        return self._process_group_backend or usual

    @override
    def setup_distributed(self) -> None:
        assert self.cluster_environment is not None
        if dist.is_initialized() or self.cluster_environment.world_size() == 1:  # Lightning asks once a block
            return
        try:
            super().setup_distributed()
        except dist.DistError as error:
            message = f"not all processes have come within {_START}: {str(error).splitlines()[0]}"
            raise ConfigurationError("trainer.num_nodes", message) from error
        self.mesh = Mesh.connected(self.wanted_segments)
        self.group = self.mesh.world
        mark_logs(self.mesh)

    @override
    def configure_ddp(self) -> None:
        """Leave the block as it is."""

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        total = self.group.sum(tensor.clone())
        is_sum = reduce_op in ("sum", dist.ReduceOp.SUM)
        return total if is_sum else total / self.group.size

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return not self.group.any(not decision) if all else self.group.any(decision)

    @override
    def barrier(self, *arguments: Any, **options: Any) -> None:
        if dist.is_initialized():
            self.group.barrier()

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        return self.group.collect(obj)[src] if dist.is_initialized() else obj


class DataParallelStrategy(GroupStrategy):
    """``ddp``: every process has a share of the samples of every step. Results are those of one but for rounding."""


class BlockParallelStrategy(GroupStrategy):
    """``block_parallel``: segments of consecutive blocks are calibrated at the same time.

    Every segment starts from the full-precision activations in front of it and is calibrated in order. Results depend
    on the number of segments, not on that of the processes: of more processes than segments several share the samples
    of a segment, of fewer each calibrates several segments in turn.

    Args:
        segments: Number of segments; null: one for each process.
        stitch_epochs: Epochs that the first blocks of every segment learn once more when all segments are done, on what
            the quantized blocks in front of them really give; 0: the segments stay as they are.
        stitch_blocks: How many blocks at the beginning of a segment these are; null: all.
        process_group_backend: As of :class:`GroupStrategy`.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    def __init__(
        self,
        segments: int | None = None,
        stitch_epochs: int = 0,
        stitch_blocks: int | None = 1,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(process_group_backend)
        for name, value, least in (("segments", segments, 1), ("stitch_blocks", stitch_blocks, 1)):
            if value is not None and value < least:
                raise ConfigurationError(f"trainer.strategy.{name}", f"{value} is not a positive number")
        if stitch_epochs < 0:
            raise ConfigurationError("trainer.strategy.stitch_epochs", f"{stitch_epochs} is below 0")
        self.segments = segments
        self.stitch_epochs = stitch_epochs
        self.stitch_blocks = stitch_blocks

    @property
    def segment_count(self) -> int:
        """Number of segments, once the processes are connected."""
        return self.mesh.world.size if self.segments is None else self.segments

    @property
    @override
    def wanted_segments(self) -> int | None:
        return self.segments


StrategyRegistry.register(
    "block_parallel", BlockParallelStrategy, description="Segments of blocks are calibrated at the same time"
)
