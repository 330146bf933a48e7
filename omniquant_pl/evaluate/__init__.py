"""What a quantized model has lost."""

from omniquant_pl.evaluate.perplexity import CalledBlock, original_blocks, perplexity
from omniquant_pl.evaluate.run import VARIANTS, Evaluation, perplexity_table
from omniquant_pl.evaluate.size import model_sizes
from omniquant_pl.evaluate.zero_shot import ZeroShot, zero_shot_table
from omniquant_pl.evaluate.zero_shot_run import measure_zero_shot, task_tokenizer

__all__ = [
    "VARIANTS",
    "CalledBlock",
    "Evaluation",
    "ZeroShot",
    "measure_zero_shot",
    "model_sizes",
    "original_blocks",
    "perplexity",
    "perplexity_table",
    "task_tokenizer",
    "zero_shot_table",
]
