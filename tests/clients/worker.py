"""Loads exported folders with a named program and writes its logits; runs in the programs' own environment.

    python worker.py FORMAT PROGRAM [FOLDER TOKENS LOGITS]...

PROGRAM is the name of one of the format's clients, or of one that is only here. TOKENS and LOGITS are .npy files.
OMNIQUANT_PATH says where the package and what it imports are found, behind the environment's own packages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these models run
sys.path += os.environ["OMNIQUANT_PATH"].split(os.pathsep)


def auto_round_logits(folder: Path, tokens: Tensor) -> Tensor:
    """auto-round's kernel in float32, told that zero points are stored as they are.

    On the CPU it makes the model float16, whatever dtype it is told; what that rounds is read once more.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    kept = {key: config.quantization_config[key] for key in ("bits", "group_size", "sym")}
    config.quantization_config = kept | {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}
    model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(folder, config=config)).eval()
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: t for name, t in stored.items() if name.endswith((".weight", ".bias"))}, strict=False)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def transformers_logits_in_half(folder: Path, tokens: Tensor) -> Tensor:
    """transformers told to use float32, and nothing else."""
    from omniquant_pl.export.clients import transformers_logits

    return transformers_logits(folder, tokens)


def transformers_logits_of_gguf(folder: Path, tokens: Tensor) -> Tensor:
    """transformers, which dequantizes a GGUF file; it does so rightly for plain LLaMA, Mistral and Qwen models only."""
    from omniquant_pl.export.clients import transformers_logits

    return transformers_logits(folder, tokens, gguf_file="model.gguf")


OTHERS = {
    "auto-round": auto_round_logits,
    "gptqmodel in half": transformers_logits_in_half,
    "transformers with gguf": transformers_logits_of_gguf,
}


def logits_of(format_name: str, program: str) -> Callable[[Path, Tensor], Tensor]:
    """The function that runs a program."""
    from omniquant_pl.export import FORMATS

    clients = {client.name: client.logits for client in FORMATS[format_name].clients}
    return (OTHERS | clients)[program]


def main(format_name: str, program: str, *jobs: str) -> None:
    """Runs a program on triples of folder, tokens and logits."""
    import torch

    torch.set_num_threads(1)
    run = logits_of(format_name, program)
    for folder, tokens, logits in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        np.save(logits, run(Path(folder), torch.from_numpy(np.load(tokens))).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
