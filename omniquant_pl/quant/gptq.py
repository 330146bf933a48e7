"""Second-order rounding: every input channel makes up for the rounding errors of those before it (GPTQ).

The squared output error of a row of a weight is ``e H e^T`` with the rounding error ``e = w - w_q`` and the second
moment ``H`` of the inputs. With ``H = V D V^T``, ``V`` unit upper triangular and ``D`` diagonal, it is a sum over
channels::

    e H e^T = sum_k D_k (e_k + sum_{j<k} e_j V_jk)^2

so the best code of channel ``k``, given those before it, is the one nearest to ``w_k + sum_{j<k} e_j V_jk``. These are
GPTQ's codes (arXiv 2210.17323), by one Cholesky factorization and without the inverse that its recursion needs; that
both are the same is theorem 6 of QuIP (arXiv 2307.13304).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from omniquant_pl.quant.affine import QuantizedWeight, quantize

__all__ = ["gptq_codes"]

_LOGGER = logging.getLogger(__name__)

_DAMPING_RAISES = (1, 10, 100)
"""Multiples of the damping that are tried in turn."""


@torch.no_grad()
def gptq_codes(
    weight: Tensor,
    moment: Tensor,
    nearest: QuantizedWeight,
    bits: int,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = True,
) -> Tensor:
    """Choose the codes of a weight with error compensation, against scales and zero points that stay as they are.

    It costs one float64 Cholesky factorization of ``[in, in]`` (``in^3 / 3`` multiplications and about three such
    matrices in memory) and ``out * in^2 / 2`` multiplications in float32, on the device of the arguments.

    Args:
        weight: ``[out, in]`` float32, as ``nearest`` quantizes it.
        moment: Second moment ``[in, in]`` of the inputs, up to a positive factor.
        nearest: The weight rounded to nearest: its scales, zero points and grouping are kept, and its codes are the
            result where the moment cannot be factored, which is logged.
        bits: Code width.
        damping: Share of the moment's mean diagonal that is added to its diagonal. It is raised to ten and a hundred
            times that where the moment is not positive definite.
        block_size: Channels between two products with all errors so far; changes the speed only.
        activation_order: Process channels by decreasing power. Groups keep their place in the weight, so this costs
            nothing in storage.

    Returns:
        Codes ``[out, in]`` in the weight's order and in the dtype of ``nearest.codes``.

    Raises:
        ValueError: If the damping is not positive.
    """
    if not damping > 0:
        raise ValueError(f"damping {damping} is not positive")
    power = moment.diagonal() if activation_order else moment.new_zeros(len(moment))
    order = power.argsort(descending=True, stable=True)
    feedback = _feedback(moment[order][:, order], damping)
    if feedback is None:
        _LOGGER.warning(
            "the second moment of the inputs is not positive definite with a damping of %g: "
            "a weight %s keeps its nearest codes",
            damping * _DAMPING_RAISES[-1],
            list(weight.shape),
        )
        return nearest.codes
    codes = torch.empty_like(nearest.codes)
    codes[:, order] = _compensate(weight.T[order], feedback, nearest, order // nearest.group_size, bits, block_size).T
    return codes


def _feedback(moment: Tensor, damping: float) -> Tensor | None:
    """Return the factor ``V`` ``[in, in]`` as float32; ``None`` if the moment stays indefinite."""
    damped = moment.double().flip(0, 1)  # the reversed lower factor is an upper one
    diagonal = damped.diagonal().clone()
    # Where all inputs are zero, any positive diagonal will do.
    unit = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for raised in _DAMPING_RAISES:
        damped.diagonal().copy_(diagonal + raised * damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            unit_lower: Tensor = lower.div_(lower.diagonal().clone())
            return unit_lower.flip(0, 1).float()
    return None


def _compensate(
    weight: Tensor, feedback: Tensor, nearest: QuantizedWeight, groups: Tensor, bits: int, block_size: int
) -> Tensor:
    """Round channel after channel.

    Args:
        weight: ``[in, out]``, in the order of processing.
        feedback: The factor ``V`` ``[in, in]`` in that order.
        nearest: Scales and zero points.
        groups: The group ``[in]`` of each channel.
        bits: Code width.
        block_size: Channels between two products with all errors so far.

    Returns:
        Codes ``[in, out]``.
    """
    symmetric = nearest.zero_point is None
    group_scales = nearest.scale.float().T  # [groups, out]
    group_zeros = torch.zeros_like(group_scales) if nearest.zero_point is None else nearest.zero_point.float().T
    errors = torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=nearest.codes.dtype)
    for start in range(0, len(weight), block_size):
        block = slice(start, start + block_size)
        scale, zero_point = group_scales[groups[block]], group_zeros[groups[block]]  # [block, out]
        wanted = weight[block] + feedback[:start, block].T @ errors[:start]
        inside, block_errors, block_codes = feedback[block, block], errors[block], codes[block]
        for k in range(len(wanted)):
            target = wanted[k] + inside[:k, k] @ block_errors[:k]
            code = quantize(target, scale[k], zero_point[k], bits, symmetric)
            block_codes[k] = code
            block_errors[k] = weight[start + k] - (code - zero_point[k]) * scale[k]
    return codes
