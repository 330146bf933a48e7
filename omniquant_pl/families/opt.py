"""OPT: LayerNorm, learned positions, ReLU, biases everywhere."""

from __future__ import annotations

from typing import Any

from omniquant_pl.families.layout import BlockLayout, Family, attention_shape, register
from omniquant_pl.transform import AttentionShape, NormToLinears, QueryToKey, UpToDown, ValueToOutput

__all__ = ["OPT"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _block(config: Any, _: int) -> BlockLayout:
    inside = (
        ValueToOutput("self_attn.v_proj", "self_attn.out_proj"),
        QueryToKey("self_attn.q_proj", "self_attn.k_proj"),
    )
    norms = (NormToLinears("self_attn_layer_norm", _QKV), NormToLinears("final_layer_norm", ("fc1",)))
    relu = config.activation_function == "relu"
    return BlockLayout(
        attention="self_attn",
        linears=(*_QKV, "self_attn.out_proj", "fc1", "fc2"),
        # Where the norms come after the residual sum (OPT-350m), the residual reads them too.
        pairs=(norms[0], *inside, norms[1]) if config.do_layer_norm_before else inside,
        mlp_pairs=(UpToDown("fc1", "fc2", positive=True),) if relu else (),
    )


def _shape(config: Any) -> AttentionShape:
    shape = attention_shape(config)
    return AttentionShape(shape.heads, shape.kv_heads, shape.head_dim, rotary_dim=0)


OPT = Family(blocks="model.decoder.layers", block=_block, shape=_shape)

register("opt", OPT)
