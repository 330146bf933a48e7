"""The pairs of operators between which scales (and shifts) move without changing the model."""

from omniquant_pl.transform.attention import (
    QueryToKey,
    QueryToKeyPair,
    ValueToOutput,
    ValueToOutputPair,
)
from omniquant_pl.transform.base import AttentionShape, BlockTensors, Pair
from omniquant_pl.transform.mlp import UpToDown, UpToDownPair
from omniquant_pl.transform.norm import NormToLinears, NormToLinearsPair

__all__ = [
    "AttentionShape",
    "BlockTensors",
    "NormToLinears",
    "NormToLinearsPair",
    "Pair",
    "QueryToKey",
    "QueryToKeyPair",
    "UpToDown",
    "UpToDownPair",
    "ValueToOutput",
    "ValueToOutputPair",
]
