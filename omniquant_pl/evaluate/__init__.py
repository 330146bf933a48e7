"""What a quantized model has lost."""

from omniquant_pl.evaluate.perplexity import CalledBlock, original_blocks, perplexity
from omniquant_pl.evaluate.run import VARIANTS, Evaluation, perplexity_table
from omniquant_pl.evaluate.size import model_sizes

__all__ = ["VARIANTS", "CalledBlock", "Evaluation", "model_sizes", "original_blocks", "perplexity", "perplexity_table"]
