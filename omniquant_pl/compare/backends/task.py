"""What every worker does: read the task, let the tool quantize, check the codes, write a plain float32 model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Task:
    """A model to quantize, asymmetric, on given tokens."""

    model: Path
    """Folder of the full-precision model."""
    tokens: Tensor
    """Token ids ``[samples, length]``, int64."""
    bits: int
    group_size: int | None
    """Input channels that share a scale; ``None``: one scale per output channel."""
    method: str
    """The method to use where the tool has several."""
    output: Path
    """Folder for the plain model; its parent may hold what the tool writes."""

    def plain_model(self) -> PreTrainedModel:
        """Return the full-precision model in float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        model.eval()
        return model


Quantizer = Callable[[Task], dict[str, Tensor]]
"""Quantizes and returns the dequantized parameters of the plain model; others beside them are passed over."""


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears that are to be quantized: all but the head."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linears.items() if not name.endswith("lm_head")}


def check_codes(weight: Tensor, bits: int, group_size: int | None) -> None:
    """Count the values in each group of a dequantized weight.

    Args:
        weight: ``[out, in]``.
        bits: Code width.
        group_size: Input channels that share a scale; ``None``: all of them.

    Raises:
        ValueError: A group has more values than codes.
    """
    groups = weight.reshape(-1, weight.shape[1] if group_size is None else group_size)  # [out · groups, group]
    values = 1 + (groups.sort(dim=1).values.diff(dim=1) > 0).sum(dim=1).max().item()
    if values > 2**bits:
        raise ValueError(f"{values} different values in a group of {bits}-bit codes")


def work(quantizer: Quantizer) -> None:
    """Run a tool on the task of the command line and save the plain model.

    Raises:
        ValueError: The result is not of the bits and groups that were asked for.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--method", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tokens = torch.from_numpy(np.load(options.calibration)).long()
    task = Task(options.model, tokens, options.bits, options.group_size, options.method, options.output)
    torch.manual_seed(0)
    parameters = quantizer(task)
    plain = task.plain_model()
    plain.load_state_dict({name: parameters[name].float() for name in plain.state_dict()})
    for linear in block_linears(plain).values():
        check_codes(linear.weight.detach(), task.bits, task.group_size)
    plain.save_pretrained(task.output)
