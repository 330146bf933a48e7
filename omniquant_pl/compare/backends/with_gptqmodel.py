"""Quantizes with gptqmodel: GPTQ."""

from __future__ import annotations

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # read when it is imported; without it, it finds no worker for the CPU

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT
from torch import Tensor

from omniquant_pl.compare.backends.task import Task, work


def gptq(task: Task) -> dict[str, Tensor]:
    """Return the parameters, the weights as gptqmodel's own loader dequantizes them."""
    per_channel = task.group_size is None
    config = QuantizeConfig(
        bits=task.bits,
        group_size=-1 if per_channel else task.group_size,
        sym=False,
        desc_act=False,
        format=FORMAT.GPTQ_V2,  # zero points as they are: version 1 stores z - 1, which has no code for 0
        act_group_aware=not per_channel,
        device="cpu",
    )
    model = GPTQModel.load(str(task.model), config, backend=BACKEND.TORCH)
    model.quantize([{"input_ids": window, "attention_mask": window.new_ones(len(window))} for window in task.tokens])
    packed = task.output.with_name("packed")
    model.save(str(packed))
    parameters = task.plain_model().state_dict()
    for name, module in GPTQModel.load(str(packed), backend=BACKEND.TORCH, device="cpu").model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            parameters[f"{name}.weight"] = module.dequantize_weight().T  # [out, in]
    return parameters


if __name__ == "__main__":
    work(gptq)
