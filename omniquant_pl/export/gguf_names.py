"""Where a model's tensors stand in a GGUF file: llama.cpp's names, the order of rows, what is added to norms.

Names and what llama.cpp does with the tensors were read in its sources, src/llama-arch.cpp and src/models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniquant_pl.families import Experts
from omniquant_pl.transform import AttentionShape, Part

__all__ = ["ARCHITECTURES", "Architecture", "Place"]

_Rows = Callable[[AttentionShape, int], Tensor]
"""Takes the heads and the rows of a tensor, and returns which of its rows stand where in the file."""

_IN_CHECKPOINTS_ONLY = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Tensors that old checkpoints hold and nothing reads."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands.

    Attributes:
        name: Its name in the file.
        rows: Order of its rows; ``None`` for the one they have.
        expert: Which of the matrices of a 3-D tensor it is; ``None`` for a tensor of its own.
    """

    name: str
    rows: _Rows | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp knows a family as.

    Attributes:
        name: ``general.architecture``.
        block: Names in the file, after ``blk.<index>.``, by the names of modules in a block.
        non_block_tensors: Names in the file by the ends of the names of the modules around the blocks.
        biases: Names in the file of what may have a bias.
        rows: Orders of rows by name in the file.
        norm_offset: What is added to the weights of norms, which the family multiplies by one plus their weight.
        experts: Names in the file of the experts' gate, up and down projections.
        can_untie: Whether the head may have a weight of its own.
        must_untie: Whether it has to.
    """

    name: str
    block: Mapping[str, str]
    non_block_tensors: Mapping[str, str]
    biases: frozenset[str]
    rows: Mapping[str, _Rows]
    norm_offset: float = 0.0
    experts: tuple[str, str, str] = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    can_untie: bool = True
    must_untie: bool = False

    def block_place(self, index: int, name: str, experts: Experts | None) -> Place | None:
        """Return where a tensor of a block stands, ``None`` if llama.cpp has no place for it.

        Args:
            index: Position of the block.
            name: The tensor's name in the block.
            experts: The experts of the block.
        """
        module, _, leaf = name.rpartition(".")
        if experts is not None and module.startswith(f"{experts.module}.") and leaf == "weight":
            number = int(module.removeprefix(f"{experts.module}.").partition(".")[0])
            kind = self.experts[experts.projections(number).index(module)]
            return Place(f"blk.{index}.{kind}.weight", expert=number)
        return self._place(f"blk.{index}.", self.block.get(module), leaf)

    def non_block_place(self, name: str) -> Place | None:
        """Return where a tensor around the blocks stands, ``None`` if llama.cpp has no place for it."""
        module, _, leaf = name.rpartition(".")
        return self._place("", self.non_block_tensors.get(module.rpartition(".")[2]), leaf)

    def _place(self, prefix: str, own: str | None, leaf: str) -> Place | None:
        if own is None or (leaf == "bias" and own not in self.biases) or leaf not in ("weight", "bias"):
            return None
        return Place(f"{prefix}{own}.{leaf}", self.rows.get(own))

    @staticmethod
    def is_unused(name: str) -> bool:
        """Return whether nothing reads a tensor that is found in a checkpoint."""
        return name.endswith(_IN_CHECKPOINTS_ONLY)

    def offset(self, name: str) -> float:
        """Return what is added to a tensor, by its name in the file."""
        return self.norm_offset if name.endswith("_norm.weight") else 0.0


def _interleaved(heads: int, rows: int) -> Tensor:
    """llama.cpp turns neighbouring channels of a LLaMA head, transformers the first half with the second."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _queries(heads: AttentionShape, rows: int) -> Tensor:
    return _interleaved(heads.heads, rows)


def _keys(heads: AttentionShape, rows: int) -> Tensor:
    return _interleaved(heads.kv_heads, rows)


def _ungrouped(heads: AttentionShape, rows: int) -> Tensor:
    """Return all queries, then all keys, then all values, of a projection that has them kv head after kv head."""
    parts = (Part("", "query", "grouped"), Part("", "key", "grouped"), Part("", "value", "grouped"))
    return torch.cat([part.rows(heads, rows) for part in parts])


_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_MLP_NORM = {"post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_NORMS_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ROUTER = {"mlp.gate": "ffn_gate_inp"}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_AROUND = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_QKV = ("attn_q", "attn_k", "attn_v")

_LLAMA = Architecture(
    "llama",
    {**_ATTENTION, **_MLP_NORM, **_MLP},
    _AROUND,
    frozenset((*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    {"attn_q": _queries, "attn_k": _keys},
)
_QWEN2 = replace(_LLAMA, name="qwen2", biases=frozenset(_QKV), rows={})
_QWEN3 = replace(_QWEN2, name="qwen3", block={**_QWEN2.block, **_HEAD_NORMS})
_GEMMA = replace(_QWEN2, name="gemma", norm_offset=1.0, can_untie=False)
_GEMMA2 = replace(_GEMMA, name="gemma2", block={**_ATTENTION, **_NORMS_AROUND, **_MLP})
_GEMMA3 = replace(_GEMMA2, name="gemma3", block={**_GEMMA2.block, **_HEAD_NORMS}, can_untie=True)
_PHI = Architecture(
    "phi2",
    {**_ATTENTION, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    {"embed_tokens": "token_embd", "final_layernorm": "output_norm", "lm_head": "output"},
    frozenset((*_QKV, "attn_norm", "attn_output", "ffn_up", "ffn_down", "output_norm", "output")),
    {},
    must_untie=True,
)
_PHI3 = Architecture(
    "phi3",
    {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        **_MLP_NORM,
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    _AROUND,
    frozenset(),
    {},
)
_FALCON = Architecture(
    "falcon",
    {
        "input_layernorm": "attn_norm",
        "ln_mlp": "attn_norm",
        "ln_attn": "attn_norm_2",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    {"word_embeddings": "token_embd", "ln_f": "output_norm", "lm_head": "output"},
    frozenset(("attn_norm", "attn_norm_2", "output_norm")),
    {"attn_qkv": _ungrouped},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(_LLAMA, block={**_ATTENTION, **_MLP_NORM, **_ROUTER}),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2, name="qwen2moe", block={**_ATTENTION, **_MLP_NORM, **_ROUTER, **_SHARED_EXPERT}, must_untie=True
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, name="qwen3moe", block={**_ATTENTION, **_HEAD_NORMS, **_MLP_NORM, **_ROUTER}),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi": _PHI,
    "phi3": _PHI3,
    "falcon": _FALCON,
}
"""By ``model_type``."""
