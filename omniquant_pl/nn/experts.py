"""Experts of a mixture as linears of their own, which transformers holds as 3-D weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["UnfusedExperts"]


class _Expert(nn.Module):
    """Three linears under the names that they have in checkpoints."""

    def __init__(self, names: tuple[str, str, str], hidden: int, intermediate: int) -> None:
        super().__init__()
        gate, up, down = names
        for name in (gate, up):
            self.add_module(name, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=False))
        self._names = names

    def forward(self, hidden: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        return cast(Tensor, down(activation(gate(hidden)) * up(hidden)))


class UnfusedExperts(nn.ModuleList):
    """Stands in the place of a transformers module with ``gate_up_proj`` and ``down_proj``; computes the same.

    Args:
        experts: The module to replace. Its weights ``[experts, 2 * intermediate, hidden]`` are not taken over.
        names: Names of an expert's gate, up and down projection.
    """

    def __init__(self, experts: nn.Module, names: tuple[str, str, str]) -> None:
        gate_up = cast(Tensor, experts.gate_up_proj)
        count, twice, hidden = gate_up.shape
        with gate_up.device:
            super().__init__(_Expert(names, hidden, twice // 2) for _ in range(count))
        self._count = count  # not the length, which the activation function counts for
        self.act_fn = cast(nn.Module, experts.act_fn)

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Sum what the chosen experts make of each token, times the router's share.

        Args:
            hidden: ``[tokens, channels]``.
            chosen: Indices of the experts ``[tokens, top_k]``.
            shares: The router's weights of them ``[tokens, top_k]``.
        """
        experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(self._count, device=experts.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # all that is waited for, however many experts there are
        tokens, shares = order // chosen.shape[1], shares.flatten()[order, None]
        result = torch.zeros_like(hidden)
        for index, (own, share) in enumerate(zip(tokens.split(counts), shares.split(counts), strict=True)):
            if len(own) > 0:
                output = self[index](hidden[own], self.act_fn) * share
                result = result.index_add(0, own, output.to(result.dtype))
        return result
