"""The formats of bitsandbytes, against their papers' formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omniquant_pl.checkpoint import BlockCall, SourceModel
from omniquant_pl.compare.bits_and_bytes import BitsAndBytesBlocks

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'omniquant-pl[bnb]'")

CPU = torch.device("cpu")


def normal_float(weight: Tensor) -> Tensor:
    """NF4 (arXiv 2305.14314, appendix E): quantiles of the normal distribution, 8 above zero and 7 below."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    offset = 0.5 * (1 - 1 / 30 + 1 - 1 / 32)
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    levels = levels / levels.max()
    groups = weight.double().reshape(-1, 64)
    scale = groups.abs().amax(dim=1, keepdim=True)
    nearest = (groups[..., None] / scale[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * scale).reshape(weight.shape)


def eight_bit(weight: Tensor, rows: Tensor) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): codes by row and by token, channels from 6 on in 16 bit."""
    half = weight.half().double()
    outliers = (rows.abs() >= 6).any(dim=0)
    scale = half.abs().amax(dim=1, keepdim=True) / 127
    codes = (half / scale).round()
    inside = rows.half().double().masked_fill(outliers, 0)
    token_scale = inside.abs().amax(dim=1, keepdim=True) / 127
    product = (inside / token_scale).round() @ codes.T * token_scale * scale.T
    return product + rows.double()[:, outliers] @ (codes * scale)[:, outliers].T


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path]) -> SourceModel:
    return SourceModel(make_llama(hidden_size=64, intermediate_size=128))


def linear_of(source: SourceModel, kind: str) -> tuple[nn.Module, Tensor, BitsAndBytesBlocks]:
    blocks = BitsAndBytesBlocks(source, kind, CPU)
    tensors = source.block_tensors(0)
    weight = tensors["mlp.up_proj.weight"].clone()
    block = blocks(0, tensors, BlockCall())
    return block.get_submodule("block.mlp.up_proj"), weight, blocks


def rows_of(outlier: float) -> Tensor:
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(3))
    rows[2, 5] = outlier
    return rows


def test_nf4(source: SourceModel) -> None:
    from bitsandbytes.functional import dequantize_4bit

    linear, weight, blocks = linear_of(source, "nf4")
    expected = normal_float(weight)
    found = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert (found.double() - expected).norm() / expected.norm() < 1e-6
    assert (weight.double() - expected).norm() / expected.norm() > 1e-2
    product = rows_of(1.0).double() @ expected.T
    assert (linear(rows_of(1.0)).double() - product).norm() / product.norm() < 5e-3  # in bfloat16 where a CPU has it
    assert blocks.stored_bits["model.layers.0.mlp.up_proj"] == 128 * 64 * 4 + 128 * 32


@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_int8(source: SourceModel, outlier: float) -> None:
    linear, weight, blocks = linear_of(source, "int8")
    rows = rows_of(outlier)
    expected = eight_bit(weight, rows)
    error = (linear(rows).double() - expected).norm() / expected.norm()
    assert error < 2e-3  # it computes in float16
    assert blocks.stored_bits["model.layers.0.mlp.up_proj"] == 128 * 64 * 8 + 128 * 32


def test_every_linear_and_nothing_else(source: SourceModel) -> None:
    blocks = BitsAndBytesBlocks(source, "nf4", CPU)
    block = blocks(1, source.block_tensors(1), BlockCall())
    swapped = {name for name, module in block.block.named_modules() if type(module).__name__ == "Linear4bit"}
    assert swapped == set(source.layouts[1].linears)
    assert set(blocks.weights) == {f"model.layers.1.{name}" for name in swapped}
