"""What a quantized model has lost: perplexity, zero-shot tasks, size."""

from omniquant_pl.evaluate.perplexity import CalledBlock, original_blocks, perplexity
from omniquant_pl.evaluate.run import VARIANTS, Evaluation, perplexity_table
from omniquant_pl.evaluate.size import model_sizes
from omniquant_pl.evaluate.zero_shot import ZeroShot, zero_shot_table

__all__ = [
    "VARIANTS",
    "CalledBlock",
    "Evaluation",
    "ZeroShot",
    "model_sizes",
    "original_blocks",
    "perplexity",
    "perplexity_table",
    "zero_shot_table",
]
