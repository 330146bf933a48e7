"""The zero-shot tasks on the original model and on what became of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.evaluate.whole import open_exported, open_full_precision
from omniquant_pl.evaluate.zero_shot import Scores, ZeroShot
from omniquant_pl.export import open_runnable
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.memory import return_free_memory

__all__ = ["measure_zero_shot", "task_tokenizer"]


def task_tokenizer(model: OmniQuantModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer that reads the tasks; asked for before any work.

    Raises:
        ConfigurationError: If the model's folder has none, or one that does not open.
    """
    what_for = "to read the tasks with, which are text; add its files, such as tokenizer.json, or leave zero_shot out"
    return model.source.found_tokenizer.needed("zero_shot", what_for)


def measure_zero_shot(
    tasks: ZeroShot, model: OmniQuantModel, run: RunFolder, exported: Path | None, device: torch.device
) -> dict[str, Scores]:
    """Measure the quantized model, then the original one; one of them is in memory, whole.

    Both compute in float32 on a CPU, in bfloat16 elsewhere.

    Args:
        tasks: What is asked.
        model: The settings.
        run: A finished run, whose model quantizes activations as the scheme says.
        exported: An exported folder to measure instead.
        device: Where to compute.

    Returns:
        Scores by task and variant: ``full_precision`` and ``quantized``, or ``exported``.

    Raises:
        ConfigurationError: If the run is not finished, a folder cannot be loaded, or there is no tokenizer.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokenizer = task_tokenizer(model)

    def quantized() -> PreTrainedModel:
        if exported is not None:
            return open_exported(exported, dtype, device)
        return open_runnable(model, run, None, dtype, device)[0]

    variants: dict[str, Callable[[], PreTrainedModel]] = {
        "quantized" if exported is None else "exported": quantized,
        "full_precision": lambda: open_full_precision(model.source, dtype, device, model.trust_remote_code),
    }
    found: dict[str, Scores] = {}
    for variant, open_model in variants.items():
        found[variant] = tasks.measure(open_model(), tokenizer)
        return_free_memory()  # or both would be there
    return {task: {variant: found[variant][task] for variant in reversed(found)} for task in next(iter(found.values()))}
