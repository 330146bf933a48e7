"""Qwen3, dense: LLaMA's block, in which queries and keys are normalized head by head."""

from __future__ import annotations

from dataclasses import replace

from omniquant_pl.families.layout import register
from omniquant_pl.families.llama import LLAMA, LLAMA_BLOCK
from omniquant_pl.transform import NormedQueryToKey, QueryToKey

__all__ = ["QWEN3", "QWEN3_BLOCK"]

_NORMED = NormedQueryToKey("self_attn.q_norm", "self_attn.k_norm")

QWEN3_BLOCK = replace(
    LLAMA_BLOCK, pairs=tuple(_NORMED if isinstance(pair, QueryToKey) else pair for pair in LLAMA_BLOCK.pairs)
)

QWEN3 = replace(LLAMA, block=lambda config, index: QWEN3_BLOCK)

register("qwen3", QWEN3)
