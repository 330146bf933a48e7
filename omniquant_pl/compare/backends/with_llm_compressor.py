"""Quantizes with llm-compressor: GPTQ, or AWQ followed by nearest rounding."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from torch.utils.data import DataLoader

from omniquant_pl.compare.backends.task import Task, block_linears, work

# llm-compressor has no pairs for OPT of its own; these are the ones of the AWQ paper's code.
OPT_PAIRS = (
    ("self_attn_layer_norm", ("q_proj", "k_proj", "v_proj")),
    ("v_proj", ("out_proj",)),
    ("final_layer_norm", ("fc1",)),
    ("fc1", ("fc2",)),
)


def recipe(task: Task, model_type: str) -> list[Modifier]:
    """Return what llm-compressor is to do."""
    strategy = "channel" if task.group_size is None else "group"
    weights = QuantizationArgs(num_bits=task.bits, symmetric=False, strategy=strategy, group_size=task.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    settings = {"config_groups": {"weights": scheme}, "ignore": ["re:.*lm_head"]}
    if task.method == "gptq":
        return [GPTQModifier(**settings)]
    mappings = [
        AWQMapping(rf"re:.*layers\.\d+\..*{source}$", [rf"re:.*layers\.\d+\..*{name}$" for name in linears])
        for source, linears in OPT_PAIRS
    ]
    return [AWQModifier(mappings=mappings if model_type == "opt" else None), QuantizationModifier(**settings)]


def compress(task: Task) -> dict[str, Tensor]:
    """Return the parameters, the weights as the quantized linears multiply with them."""
    # It pins host memory for copies to an accelerator, and fails on a machine without one.
    IntermediatesCache.pin_memory = lambda *_: None
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in task.tokens]
    model = task.plain_model()
    oneshot(
        model=model,
        recipe=recipe(task, model.config.model_type),
        dataset=DataLoader(samples, batch_size=1),  # type: ignore[arg-type]
        num_calibration_samples=len(samples),
        max_seq_length=task.tokens.shape[1],
        pipeline="sequential",
    )
    parameters = dict(model.state_dict())
    for name, linear in block_linears(model).items():
        scheme = linear.quantization_scheme.weights  # type: ignore[union-attr] # of compressed-tensors
        parameters[f"{name}.weight"] = forward_quantize(linear, linear.weight.detach(), "weight", scheme)
    return parameters


if __name__ == "__main__":
    work(compress)
