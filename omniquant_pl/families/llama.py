"""LLaMA 1, 2 and 3 and what is built alike: RMSNorm, rotary embeddings, grouped queries, gated MLP."""

from __future__ import annotations

from omniquant_pl.families.layout import BlockLayout, Family, register
from omniquant_pl.transform import NormToLinears, QueryToKey, UpToDown, ValueToOutput

__all__ = ["LLAMA", "LLAMA_BLOCK", "LLAMA_HEAD"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

LLAMA_BLOCK = BlockLayout(
    attention="self_attn",
    linears=(*_QKV, "self_attn.o_proj", *_GATE_UP, "mlp.down_proj"),
    pairs=(
        NormToLinears("input_layernorm", _QKV),
        ValueToOutput("self_attn.v_proj", "self_attn.o_proj"),
        QueryToKey("self_attn.q_proj", "self_attn.k_proj"),
        NormToLinears("post_attention_layernorm", _GATE_UP),
    ),
    mlp_pairs=(UpToDown("mlp.up_proj", "mlp.down_proj"),),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)
LLAMA_HEAD = NormToLinears("model.norm", ("lm_head",))

LLAMA = Family(blocks="model.layers", block=lambda config, index: LLAMA_BLOCK, head=LLAMA_HEAD)

register("llama", LLAMA)
register("mistral", LLAMA)
register("qwen2", LLAMA)
