"""Phi-3 and Phi-4: like LLaMA, with fused query-key-value and gate-up projections; partly rotary in the newer ones."""

from __future__ import annotations

from typing import Any

from omniquant_pl.families.layout import BlockLayout, Family, attention_shape, register
from omniquant_pl.families.llama import LLAMA_HEAD
from omniquant_pl.transform import AttentionShape, NormToLinears, Part, QueryToKey, UpToDown, ValueToOutput

__all__ = ["PHI3"]

_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"

_BLOCK = BlockLayout(
    attention="self_attn",
    linears=(_QKV, "self_attn.o_proj", _GATE_UP, "mlp.down_proj"),
    pairs=(
        NormToLinears("input_layernorm", (_QKV,)),
        ValueToOutput(Part(_QKV, "value"), "self_attn.o_proj"),
        QueryToKey(Part(_QKV, "query"), Part(_QKV, "key")),
        NormToLinears("post_attention_layernorm", (_GATE_UP,)),
    ),
    mlp_pairs=(UpToDown(Part(_GATE_UP, "up"), "mlp.down_proj"),),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)


def _shape(config: Any) -> AttentionShape:
    shape = attention_shape(config)
    turned = int(shape.head_dim * config.rope_parameters["partial_rotary_factor"])
    return AttentionShape(shape.heads, shape.kv_heads, shape.head_dim, turned)


PHI3 = Family(blocks="model.layers", block=lambda config, index: _BLOCK, shape=_shape, head=LLAMA_HEAD)

register("phi3", PHI3)
