"""Falcon 1 and 2: LayerNorm, GELU, fused query-key-value projection, rotary embeddings or ALiBi; three layouts.

7B has one key and value head; 40B, 180B and 11B have several, each behind its own query heads; RW has as many as query
heads, biases, and the MLP behind the attention. In the first two both read the block's input side by side.
"""

from __future__ import annotations

from typing import Any

from omniquant_pl.families.layout import BlockLayout, Family, register
from omniquant_pl.transform import AttentionShape, NormToLinears, Part, QueryToKey, ValueToOutput

__all__ = ["FALCON"]

_QKV, _UP = "self_attention.query_key_value", "mlp.dense_h_to_4h"


def _norms(config: Any) -> tuple[NormToLinears, ...]:
    if not config.parallel_attn:
        return NormToLinears("input_layernorm", (_QKV,)), NormToLinears("post_attention_layernorm", (_UP,))
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        return NormToLinears("ln_attn", (_QKV,)), NormToLinears("ln_mlp", (_UP,))
    return (NormToLinears("input_layernorm", (_QKV, _UP)),)


def _block(config: Any, _: int) -> BlockLayout:
    query, key, value = (Part(_QKV, kind, "grouped") for kind in ("query", "key", "value"))
    return BlockLayout(
        attention="self_attention",
        linears=(_QKV, "self_attention.dense", _UP, "mlp.dense_4h_to_h"),
        pairs=(*_norms(config), ValueToOutput(value, "self_attention.dense"), QueryToKey(query, key)),
        # Nothing inside the MLP: no scale passes through the GELU.
    )


def _shape(config: Any) -> AttentionShape:
    heads = config.num_attention_heads
    old = 1 if config.multi_query else heads
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else old
    return AttentionShape(heads, kv_heads, config.head_dim, rotary_dim=0 if config.alibi else None)


def _refuse(config: Any) -> str | None:
    if config.new_decoder_architecture and not config.parallel_attn:
        return "transformers itself does not run new_decoder_architecture without parallel_attn"
    return None


# Its attention calls torch's function itself. transformers' eager one counts ALiBi twice (seen in 5.17 and 5.22).
FALCON = Family(
    blocks="transformer.h", block=_block, shape=_shape, refuse=_refuse, attention="sdpa", returns_tuple=True
)

register("falcon", FALCON)
