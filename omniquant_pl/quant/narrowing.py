"""Casts to the dtype that values are stored or computed in, which refuse values that it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omniquant_pl.errors import ConfigurationError

__all__ = ["NarrowDtypeError", "Narrowing"]

_WIDER = (torch.float16, torch.bfloat16, torch.float32)
"""By their largest value."""


class NarrowDtypeError(ConfigurationError):
    """A finite value that a dtype holds as infinity, or not exactly where it has to.

    Attributes:
        holding: Name of the narrowest dtype that holds all values of the tensor.
    """

    def __init__(self, key: str, message: str, holding: str) -> None:
        super().__init__(key, message)
        self.holding = holding


@dataclass(frozen=True)
class Narrowing:
    """A dtype that values are cast to, and what errors say of it.

    Attributes:
        dtype: The dtype.
        key: The setting that decides it.
        reason: Why it is that dtype, where the setting does not say so: a clause that follows its name.
        remedy: What to do about a value that it does not hold; ``{}`` stands for a dtype that does.
    """

    dtype: torch.dtype
    key: str
    reason: str = ""
    remedy: str = "{} holds it"

    def cast(self, name: str, tensor: Tensor, is_exact: bool = False) -> Tensor:
        """Return a tensor of finite values in :attr:`dtype`.

        Args:
            name: Name of the tensor, for the error.
            tensor: The values, in a float dtype; integers are left as they are.
            is_exact: Whether values must not be rounded either.

        Raises:
            NarrowDtypeError: If a value does not fit; it names the tensor, the value and a dtype that holds it.
        """
        if not tensor.is_floating_point():
            return tensor
        narrow = tensor.to(self.dtype)
        lost = narrow.to(tensor.dtype) != tensor if is_exact else ~narrow.isfinite()
        if bool(lost.any()):
            self._refuse(name, tensor[lost], is_exact)
        return narrow

    def check_weight(self, name: str, scale: Tensor, dequantize: Callable[[], Tensor]) -> None:
        """Check that the dequantized values of a weight fit; they are computed only if the scales leave it open.

        Args:
            name: Name of the weight, for the error.
            scale: Its scales.
            dequantize: Returns its values.

        Raises:
            NarrowDtypeError: As :meth:`cast`.
        """
        widest = 2 ** torch.iinfo(torch.uint8).bits  # codes are eight bits at most
        if float(scale.abs().max()) * widest > torch.finfo(self.dtype).max:
            self.cast(name, dequantize())

    def _refuse(self, name: str, lost: Tensor, is_exact: bool) -> None:
        worst = lost[lost.abs().argmax()]
        value, largest = float(worst), torch.finfo(self.dtype).max
        beyond = f"beyond {_name(self.dtype)} (at most {largest:.6g})"
        fault = beyond if not bool(worst.to(self.dtype).isfinite()) else f"which {_name(self.dtype)} rounds"
        holding = _name(_holding(lost, is_exact))
        message = f"{name} has the value {value:.6g}, {fault}{self.reason}; {self.remedy.format(holding)}"
        raise NarrowDtypeError(self.key, message, holding)


def _holding(values: Tensor, is_exact: bool) -> torch.dtype:
    """Return the narrowest dtype in which all values are finite, or exact; float16 aside, which has been tried."""
    for dtype in _WIDER[1:]:
        narrow = values.to(dtype)
        if bool((narrow.to(values.dtype) == values if is_exact else narrow.isfinite()).all()):
            return dtype
    return torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
