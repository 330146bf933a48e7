"""Fake quantization with analytic straight-through gradients.

A round passes its gradient as if it were the identity. What follows from that for the scale and the zero point is
written out in :mod:`omniquant_pl.ops`, so that no intermediate of the element-wise formula is kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omniquant_pl import ops
from omniquant_pl.spec import ActivationSpec

__all__ = ["activation_quantizer", "dynamic_fake_quantize", "fake_quantize"]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
        ctx.save_for_backward(rows, scale, zero_point)
        ctx.limits = (lowest, highest)
        return ops.fake_quantize(rows, scale, zero_point, lowest, highest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ops.fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.limits)
        return (*grads, None, None)


class _DynamicFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: int, symmetric: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.options = (bits, symmetric)
        return ops.dynamic_fake_quantize(rows, bits, symmetric)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return ops.dynamic_fake_quantize_backward(grad.contiguous(), rows, *ctx.options), None, None


def fake_quantize(rows: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    """Round rows to their codes and back: ``(clamp(round(x / s) + z, lowest, highest) - z) * s``.

    Args:
        rows: Values ``[rows, columns]``, float32 or float64.
        scale: Scale per row ``[rows, 1]``.
        zero_point: Zero point per row ``[rows, 1]``, integer values.
        lowest: Lowest code.
        highest: Highest code.

    Returns:
        ``[rows, columns]``, differentiable in rows, scale and zero point.
    """
    result: Tensor = _FakeQuantize.apply(rows, scale, zero_point, lowest, highest)  # type: ignore[no-untyped-call]
    return result


def dynamic_fake_quantize(values: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Fake quantization over the last dimension with the range of each slice, as for activations per token.

    Args:
        values: ``[..., channels]``; half precisions are computed in float32 and returned in their own dtype.
        bits: Code width, 2 to 8.
        symmetric: Signed codes and no zero point.

    Returns:
        Same shape and dtype, differentiable, the gradient through minimum and maximum included.
    """
    rows = values.reshape(-1, values.shape[-1])
    result: Tensor = _DynamicFakeQuantize.apply(rows, bits, symmetric)  # type: ignore[no-untyped-call]
    return result.view(values.shape)


def activation_quantizer(spec: ActivationSpec | None) -> Callable[[Tensor], Tensor] | None:
    """Return the fake quantization of activations, token by token; ``None`` if they are not quantized."""
    if spec is None:
        return None
    return partial(dynamic_fake_quantize, bits=spec.bits, symmetric=spec.symmetric)
