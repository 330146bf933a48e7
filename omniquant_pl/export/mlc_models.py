"""The models that MLC-LLM knows as transformers computes them: names, projections that it fuses, configurations.

Read in mlc_llm/model/<family>/<family>_model.py and the loaders beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omniquant_pl.transform import AttentionShape

__all__ = ["FAMILIES", "MlcFamily", "model_config", "model_refusal"]

_QKV = tuple(f"self_attn.{kind}_proj" for kind in ("q", "k", "v"))
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_PREFILL = 2048


@dataclass(frozen=True)
class MlcFamily:
    """A family.

    Attributes:
        fused: Projections whose rows stand one after the other, by the name of what they become.
        has_biases: Whether queries, keys and values have biases; ``None``: as ``attention_bias`` says, which holds for
            the output projection too.
        can_tie: Whether the head may be the embedding.
    """

    fused: Mapping[str, tuple[str, ...]]
    has_biases: bool | None = False
    can_tie: bool = True


_LLAMA = {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP}
_QWEN = {"self_attn.c_attn": _QKV, "mlp.gate_up_proj": _GATE_UP}

FAMILIES: Mapping[str, MlcFamily] = {
    "llama": MlcFamily(_LLAMA),
    "mistral": MlcFamily(_LLAMA, can_tie=False),
    "qwen2": MlcFamily(_QWEN, has_biases=True),
    "qwen3": MlcFamily(_QWEN, has_biases=None),
}
"""By ``model_type``, which is MLC-LLM's name for them as well."""


def model_refusal(model_type: str, config: Any, is_tied: bool) -> str | None:
    """Return what MLC-LLM would compute otherwise than transformers, ``None`` if it computes the same.

    Args:
        model_type: The family.
        config: The model's configuration.
        is_tied: Whether the head is the embedding.
    """
    if model_type not in FAMILIES:
        return f"this writes models of MLC-LLM's families {', '.join(FAMILIES)}, not {model_type}"
    if config.hidden_act != "silu":
        return f"MLC-LLM has no {config.hidden_act} activation in this family"
    if is_tied and not FAMILIES[model_type].can_tie:
        return "MLC-LLM wants a head of its own in this family, here it is the embedding"
    if FAMILIES[model_type].has_biases is False and (
        getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    ):
        return "MLC-LLM has no biases in this family"
    kind = config.rope_parameters["rope_type"]
    if kind != "default" and (model_type, kind) != ("llama", "llama3"):
        return f"MLC-LLM has no rotary embeddings of type {kind} in this family"
    if model_type in ("qwen2", "qwen3") and "sliding_attention" in config.layer_types:
        return "MLC-LLM has no sliding window in this family"
    return None


def model_config(model_type: str, config: Any, heads: AttentionShape, is_tied: bool) -> dict[str, Any]:
    """Return what stands under ``model_config`` in ``mlc-chat-config.json``.

    Args:
        model_type: The family.
        config: The model's configuration.
        heads: Its heads.
        is_tied: Whether the head is the embedding.
    """
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None) if model_type == "mistral" else None
    context = -1 if window else config.max_position_embeddings
    values = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads.heads,
        "num_hidden_layers": config.num_hidden_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "num_key_value_heads": heads.kv_heads,
        "head_dim": heads.head_dim,
        "context_window_size": context,
        "prefill_chunk_size": min(window or context, _PREFILL),
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
    }
    if model_type == "mistral":
        extra = {"sliding_window_size": window or -1, "attention_sink_size": 4}
        return values | extra | {"position_embedding_base": rope["rope_theta"]}
    values["tie_word_embeddings"] = is_tied
    if model_type == "llama":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaled = None if rope["rope_type"] == "default" else scaling
        return values | {"position_embedding_base": rope["rope_theta"], "rope_scaling": scaled}
    values |= {"hidden_act": config.hidden_act, "rope_theta": rope["rope_theta"], "dtype": "float32"}
    return values | ({"attention_bias": config.attention_bias} if model_type == "qwen3" else {})
