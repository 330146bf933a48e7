"""Phi-1, Phi-1.5, Phi-2: attention and MLP side by side behind one LayerNorm, partly rotary, biases everywhere."""

from __future__ import annotations

from typing import Any

from omniquant_pl.families.layout import BlockLayout, Family, attention_shape, register
from omniquant_pl.transform import AttentionShape, NormedQueryToKey, NormToLinears, QueryToKey, ValueToOutput

__all__ = ["PHI"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _block(config: Any, _: int) -> BlockLayout:
    query_to_key = (
        NormedQueryToKey("self_attn.q_layernorm", "self_attn.k_layernorm")
        if config.qk_layernorm
        else QueryToKey("self_attn.q_proj", "self_attn.k_proj")
    )
    return BlockLayout(
        attention="self_attn",
        linears=(*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
        pairs=(
            NormToLinears("input_layernorm", (*_QKV, "mlp.fc1")),
            ValueToOutput("self_attn.v_proj", "self_attn.dense"),
            query_to_key,
        ),
        # Not fc1 to fc2: no scale passes through the GELU.
    )


def _shape(config: Any) -> AttentionShape:
    shape = attention_shape(config)
    turned = int(shape.head_dim * config.rope_parameters["partial_rotary_factor"])
    return AttentionShape(shape.heads, shape.kv_heads, shape.head_dim, turned)


PHI = Family(blocks="model.layers", block=_block, shape=_shape)

register("phi", PHI)
