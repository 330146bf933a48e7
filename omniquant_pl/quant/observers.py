"""What the calibration data looks like where it enters a linear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelRange", "observe", "observe_inputs"]


@dataclass
class ChannelRange:
    """Lowest and highest value of every input channel, ``[channels]`` each, over all tokens seen."""

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """Largest absolute value of every channel."""
        return torch.maximum(self.high, -self.low)

    @property
    def middle(self) -> Tensor:
        """Middle of every channel's range."""
        return (self.high + self.low) / 2

    @staticmethod
    def of(values: Tensor) -> ChannelRange:
        """Return the range of ``[..., channels]``."""
        low, high = torch.aminmax(values.detach().float().reshape(-1, values.shape[-1]), dim=0)
        return ChannelRange(low, high)

    def extend(self, values: Tensor) -> None:
        """Widen the range to contain further values ``[..., channels]``."""
        other = ChannelRange.of(values)
        self.low, self.high = (
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )


@contextmanager
def observe_inputs(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, ChannelRange]]:
    """Record the input ranges of submodules for as long as the context lasts.

    Args:
        module: The module that holds them.
        names: Dotted names of submodules whose first argument is ``[..., channels]``.

    Yields:
        A dictionary that fills while the module runs, by name.
    """
    ranges: dict[str, ChannelRange] = {}

    def record(name: str, values: Tensor) -> None:
        if name in ranges:
            ranges[name].extend(values)
        else:
            ranges[name] = ChannelRange.of(values)

    with observe(module, names, record):
        yield ranges


@contextmanager
def observe(module: nn.Module, names: Iterable[str], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand the first argument of submodules to a function for as long as the context lasts.

    Args:
        module: The module that holds them.
        names: Their dotted names.
        record: Gets the name and the argument, unless that holds no token.
    """

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].numel() > 0:
                record(name, args[0].detach())

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
