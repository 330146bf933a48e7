"""What a quantized model has lost."""

from omniquant_pl.evaluate.perplexity import original_blocks, perplexity
from omniquant_pl.evaluate.run import VARIANTS, Evaluation, perplexity_table

__all__ = ["VARIANTS", "Evaluation", "original_blocks", "perplexity", "perplexity_table"]
