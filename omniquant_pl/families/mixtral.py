"""Mixtral: LLaMA's attention, and experts of which a router chooses some for every token."""

from __future__ import annotations

from typing import Any

from omniquant_pl.families.layout import BlockLayout, Experts, Family, register
from omniquant_pl.families.llama import LLAMA_BLOCK, LLAMA_HEAD
from omniquant_pl.families.moe import mixture_block, routing_refusal

__all__ = ["MIXTRAL"]

_EXPERTS = Experts("mlp.experts", gate="w1", up="w3", down="w2")


def _block(config: Any, _: int) -> BlockLayout:
    return mixture_block(
        LLAMA_BLOCK, "post_attention_layernorm", _EXPERTS, config.num_local_experts, routers=("mlp.gate",)
    )


MIXTRAL = Family(
    blocks="model.layers",
    block=_block,
    refuse=lambda config: routing_refusal(config, config.num_local_experts),
    stored=(("mlp.", "block_sparse_moe."),),
    head=LLAMA_HEAD,
)

register("mixtral", MIXTRAL)
