"""Qwen2-MoE and Qwen3-MoE: the dense families' attention; experts in some blocks, a dense MLP in the others."""

from __future__ import annotations

from typing import Any

from omniquant_pl.families.layout import BlockLayout, Experts, Family, register
from omniquant_pl.families.llama import LLAMA_BLOCK, LLAMA_HEAD
from omniquant_pl.families.moe import mixture_block, routing_refusal
from omniquant_pl.families.qwen3 import QWEN3_BLOCK

__all__ = ["QWEN2_MOE", "QWEN3_MOE"]

_NORM = "post_attention_layernorm"
_EXPERTS = Experts("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj")
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")


def _is_mixture(config: Any, index: int) -> bool:
    every: int = config.decoder_sparse_step
    return index not in config.mlp_only_layers and config.num_experts > 0 and (index + 1) % every == 0


def _qwen2_block(config: Any, index: int) -> BlockLayout:
    if not _is_mixture(config, index):
        return LLAMA_BLOCK
    routers = ("mlp.gate", "mlp.shared_expert_gate")
    return mixture_block(LLAMA_BLOCK, _NORM, _EXPERTS, config.num_experts, routers, shared=(_SHARED,))


def _qwen3_block(config: Any, index: int) -> BlockLayout:
    if not _is_mixture(config, index):
        return QWEN3_BLOCK
    return mixture_block(QWEN3_BLOCK, _NORM, _EXPERTS, config.num_experts, routers=("mlp.gate",))


def _refuse(config: Any) -> str | None:
    return routing_refusal(config, config.num_experts) if config.num_experts > 0 else None


QWEN2_MOE = Family(blocks="model.layers", block=_qwen2_block, refuse=_refuse, head=LLAMA_HEAD)
QWEN3_MOE = Family(blocks="model.layers", block=_qwen3_block, refuse=_refuse, head=LLAMA_HEAD)

register("qwen2_moe", QWEN2_MOE)
register("qwen3_moe", QWEN3_MOE)
