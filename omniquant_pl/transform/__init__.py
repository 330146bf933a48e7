"""The pairs of operators between which scales and shifts move without changing the model."""

from omniquant_pl.transform.attention import NormedQueryToKey, QueryToKey, ValueToOutput
from omniquant_pl.transform.base import BlockTensors, Pair
from omniquant_pl.transform.heads import AttentionShape, Part
from omniquant_pl.transform.mlp import UpToDown
from omniquant_pl.transform.norm import NormToLinears

__all__ = [
    "AttentionShape",
    "BlockTensors",
    "NormToLinears",
    "NormedQueryToKey",
    "Pair",
    "Part",
    "QueryToKey",
    "UpToDown",
    "ValueToOutput",
]
