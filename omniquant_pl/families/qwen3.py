"""Qwen3, dense: LLaMA's block, in which queries and keys are normalized head by head."""

from __future__ import annotations

from omniquant_pl.families.layout import BlockLayout, Family, register
from omniquant_pl.families.llama import LLAMA_HEAD
from omniquant_pl.transform import NormedQueryToKey, NormToLinears, UpToDown, ValueToOutput

__all__ = ["QWEN3", "QWEN3_BLOCK"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

QWEN3_BLOCK = BlockLayout(
    attention="self_attn",
    linears=(*_QKV, "self_attn.o_proj", *_GATE_UP, "mlp.down_proj"),
    pairs=(
        NormToLinears("input_layernorm", _QKV),
        ValueToOutput("self_attn.v_proj", "self_attn.o_proj"),
        NormedQueryToKey("self_attn.q_norm", "self_attn.k_norm"),
        NormToLinears("post_attention_layernorm", _GATE_UP),
    ),
    mlp_pairs=(UpToDown("mlp.up_proj", "mlp.down_proj"),),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)

QWEN3 = Family(blocks="model.layers", block=lambda config, index: QWEN3_BLOCK, head=LLAMA_HEAD)

register("qwen3", QWEN3)
