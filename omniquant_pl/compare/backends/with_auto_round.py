"""Quantizes with auto-round: rounding and ranges by signed gradient descent, 200 iterations a block."""

from __future__ import annotations

from auto_round import AutoRound
from torch import Tensor
from transformers import AutoTokenizer

from omniquant_pl.compare.backends.task import Task, work

BATCH = 8
ITERATIONS = 200


def signround(task: Task) -> dict[str, Tensor]:
    """Return the parameters with the weights that auto-round leaves in the model, in float32."""
    tool = AutoRound(
        task.plain_model(),
        tokenizer=AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=-1 if task.group_size is None else task.group_size,
        sym=False,
        iters=ITERATIONS,
        dataset=list(task.tokens.split(BATCH)),
        seqlen=task.tokens.shape[1],
        nsamples=len(task.tokens),
        batch_size=BATCH,
        amp=False,
        enable_torch_compile=False,  # compiling takes longer than such small models do
        device_map="cpu",
    )
    model, _ = tool.quantize()
    return dict(model.state_dict())


if __name__ == "__main__":
    work(signround)
