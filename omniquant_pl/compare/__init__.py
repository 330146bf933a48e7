"""The same model by several methods: which one loses least, and what it costs."""

from omniquant_pl.compare.comparison import Comparison, MethodName
from omniquant_pl.compare.contender import Bench
from omniquant_pl.compare.row import Row, comparison_table

__all__ = ["Bench", "Comparison", "MethodName", "Row", "comparison_table"]
