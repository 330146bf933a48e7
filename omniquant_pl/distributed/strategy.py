"""Strategies: Lightning launches the processes and connects them, and then takes each group of them for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

from omniquant_pl.distributed.gradients import average_gradients
from omniquant_pl.distributed.group import Group

__all__ = ["DataParallelStrategy", "GroupStrategy"]

_T = TypeVar("_T")

_PATIENCE = timedelta(days=30)
"""A segment may wait for the others for hours; that a process is dead is noticed otherwise."""


class GroupStrategy(DDPStrategy):
    """Processes that work on samples of one block each, as one process would.

    Launching, ranks and the process group are those of ``DDPStrategy``. A block is not wrapped: its weights are no
    parameters, and need not be sent at every step, and after a step that did not fit into memory a wrapper could not be
    used any more. The gradients of the factors are averaged in front of the optimizer's step. Lightning is told that it
    is alone, as it would synchronise the processes at every step otherwise.

    Args:
        process_group_backend: Of torch.distributed; null: gloo on the CPU, with nccl for tensors on CUDA devices.
    """

    def __init__(self, process_group_backend: str | None = None, **options: Any) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=_PATIENCE, **options)
        self._group: Group | None = None

    @property
    def group(self) -> Group:
        """The processes that work on the same thing as this one at the moment."""
        return self.world if self._group is None else self._group

    @property
    def world(self) -> Group:
        """All processes."""
        environment = self.cluster_environment
        return Group() if environment is None else Group(environment.global_rank(), environment.world_size())

    @contextmanager
    def inside(self, group: Group) -> Iterator[None]:
        """For a while, this process works with the processes of a group only."""
        before, self._group = self._group, group
        rank = rank_zero_only.rank
        rank_zero_only.rank = group.rank  # a group keeps a log of its own
        try:
            yield
        finally:
            self._group, rank_zero_only.rank = before, rank

    @property
    @override
    def world_size(self) -> int:
        return 1

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.group.is_first

    @override
    def _get_process_group_backend(self) -> str:
        usual = "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"
        return self._process_group_backend or usual

    @override
    def setup_distributed(self) -> None:
        if not torch.distributed.is_initialized():  # Lightning asks for it once a block
            super().setup_distributed()

    @override
    def configure_ddp(self) -> None:
        """Leaves the block as it is."""

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **options: Any) -> Any:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def averaged() -> Any:
            result = closure()
            average_gradients(parameters, self.group)
            return result

        return super().optimizer_step(optimizer, averaged, model, **options)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        total = self.group.sum(tensor.clone())
        is_sum = reduce_op in ("sum", torch.distributed.ReduceOp.SUM)
        return total if is_sum else total / self.group.size

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return not self.group.any(not decision) if all else self.group.any(decision)

    @override
    def barrier(self, *arguments: Any, **options: Any) -> None:
        if torch.distributed.is_initialized():
            self.group.barrier()

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        return self.group.collect(obj)[src] if torch.distributed.is_initialized() else obj


class DataParallelStrategy(GroupStrategy):
    """``ddp``: every process has a share of the samples of every step. Results are those of one process."""
