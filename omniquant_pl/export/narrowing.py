"""Tensors in the dtype that a format stores them in, without infinities that the model does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.quant.storage import overflowing_value

__all__ = ["narrowed"]


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str, only: str | None = None) -> Tensor:
    """Return a tensor in another dtype, in which all of its values stay finite.

    Args:
        tensor: Finite values, of any shape.
        dtype: What it is stored in.
        name: Its name, for the error.
        only: The format that has no other dtype; ``None`` where the dtype is a choice.

    Raises:
        ConfigurationError: If the dtype does not hold a value; it names the tensor, the value and what holds it.
    """
    value = overflowing_value(tensor, dtype)
    if value is None:
        return tensor.to(dtype)
    found = f"{name} holds {value:g}, and the largest value of {str(dtype).removeprefix('torch.')} is"
    limit = f"{torch.finfo(dtype).max:g}"
    if only is not None:
        raise ConfigurationError(
            "export.format", f"{found} {limit}, which is all that {only} has; choose another format"
        )
    raise ConfigurationError("export.dtype", f"{found} {limit}; set it to bfloat16 or float32")
