"""Gemma 1, 2 and 3: norms that multiply by one plus their weight; from Gemma 2 on, norms around each sublayer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omniquant_pl.families.layout import BlockLayout, Family, PairLayout, register
from omniquant_pl.transform import NormedQueryToKey, NormToLinears, QueryToKey, UpToDown, ValueToOutput

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_OFFSET = 1.0


def _layout(mlp_norm: str, query_to_key: PairLayout) -> BlockLayout:
    return BlockLayout(
        attention="self_attn",
        linears=(*_QKV, "self_attn.o_proj", *_GATE_UP, "mlp.down_proj"),
        # The norms behind the sublayers, post_attention_layernorm (Gemma 2 and 3) and post_feedforward_layernorm, give
        # their output to the residual stream: no scale goes through them.
        pairs=(
            NormToLinears("input_layernorm", _QKV, offset=_OFFSET),
            ValueToOutput("self_attn.v_proj", "self_attn.o_proj"),
            query_to_key,
            NormToLinears(mlp_norm, _GATE_UP, offset=_OFFSET),
        ),
        mlp_pairs=(UpToDown("mlp.up_proj", "mlp.down_proj"),),
    )


def _refuse(config: Any) -> str | None:
    if getattr(config.get_text_config(), "use_bidirectional_attention", None):
        return "it looks at later tokens too (use_bidirectional_attention), so it is no causal language model"
    return None


_PROJECTIONS = QueryToKey("self_attn.q_proj", "self_attn.k_proj")
_NORMS = NormedQueryToKey("self_attn.q_norm", "self_attn.k_norm", offset=_OFFSET)
_GEMMA_BLOCK = replace(_layout("post_attention_layernorm", _PROJECTIONS), writers=("self_attn.o_proj", "mlp.down_proj"))
_GEMMA2_BLOCK = _layout("pre_feedforward_layernorm", _PROJECTIONS)
_GEMMA3_BLOCK = _layout("pre_feedforward_layernorm", _NORMS)

GEMMA = Family(
    blocks="model.layers",
    block=lambda config, index: _GEMMA_BLOCK,
    refuse=_refuse,
    head=NormToLinears("model.norm", ("lm_head",), offset=_OFFSET),
)
GEMMA2 = Family(blocks="model.layers", block=lambda config, index: _GEMMA2_BLOCK, refuse=_refuse)
GEMMA3 = Family(blocks="model.layers", block=lambda config, index: _GEMMA3_BLOCK, refuse=_refuse)

register("gemma", GEMMA)
register("gemma2", GEMMA2)
register("gemma3_text", GEMMA3)
# With a vision encoder, which stays as it is.
register(
    "gemma3",
    GEMMA3,
    blocks="model.language_model.layers",
    stored=(("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    unread=("model.vision_tower", "model.multi_modal_projector"),
)
