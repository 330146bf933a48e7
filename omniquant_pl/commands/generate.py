"""The command ``generate``: text from the packed model of a finished run."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import StorageDtype, open_runnable
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.runtime import (
    Generation,
    Sampling,
    generate,
    generation_table,
    memory_line,
    usable_device,
    write_terminal,
)
from omniquant_pl.trainer.run_trainer import RunTrainer

__all__ = ["generate_text"]


def generate_text(
    trainer: RunTrainer,
    model: OmniQuantModel,
    datamodule: CalibrationData,
    prompt: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    packed: str | None = None,
    device: str | None = None,
    dtype: StorageDtype | None = None,
) -> Generation:
    """Generate text with the packed model of a finished run.

    Args:
        trainer: Whose run it is.
        model: The run's model settings.
        datamodule: Not used; a run's configuration has it.
        prompt: The text to go on from.
        chat: Put the prompt into the tokenizer's chat template, and show the answer alone.
        max_new_tokens: Tokens to generate at most; fewer where the model ends the text or has no positions left.
        temperature: 0 takes the likeliest token; otherwise what the logits are divided by before one is drawn.
        top_k: Draw among so many of the likeliest tokens; null: among all.
        top_p: Draw among the likeliest tokens that together have this probability; null: among all.
        seed: Of the draws.
        packed: A packed folder to load instead of the run's model; null: packed/ in the run folder, or, where that
            is missing or older than the run, the run's model, packed in memory.
        device: Where to compute, such as cpu or cuda; null: the trainer's device.
        dtype: What is not quantized is held and computed in it; null: float32 on a CPU, bfloat16 elsewhere.

    Returns:
        The tokens and how long they took.

    Raises:
        ConfigurationError: If the run or the folder cannot be used, or a setting is out of range.
    """
    del datamodule
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if not prompt:
        raise ConfigurationError("prompt", "give the text to go on from, such as --prompt 'Once'")
    target = trainer.strategy.root_device if device is None else usable_device(device)
    usual: StorageDtype = "float32" if target.type == "cpu" else "bfloat16"
    folder = None if packed is None else Path(packed)
    network, tokenizer = open_runnable(model, trainer.run_folder, folder, getattr(torch, dtype or usual), target)
    result = generate(network, tokenizer, prompt, sampling, chat, write_terminal)
    Console().print("", generation_table(result), memory_line(network), sep="\n", soft_wrap=True)
    return result
