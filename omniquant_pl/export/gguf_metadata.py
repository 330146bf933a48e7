"""What a GGUF file says about an architecture, and the architectures that llama.cpp computes otherwise.

Keys, and what llama.cpp assumes without being told, were read in its sources: src/llama-arch.cpp, src/models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.transform import AttentionShape

__all__ = ["Value", "hyperparameters", "refusal", "rotary_tensors"]

Value = str | bool | int | float
"""What stands under a key: a string, a truth value, an unsigned number of 32 bit, or a float32."""

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ACTIVATIONS = {
    "gemma": _TANH_GELU,
    "gemma2": _TANH_GELU,
    "gemma3": _TANH_GELU,
    "gemma3_text": _TANH_GELU,
    "phi": _TANH_GELU,
    "falcon": ("gelu", *_TANH_GELU),  # llama.cpp has the tanh of it, whichever it is
}
_SLIDING_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}
"""Of so many layers all but the last look at a window only."""
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62, "gemma3_text": 62}
"""Layers of the models that scale queries by the hidden size over the heads."""
_NORMALIZES_EXPERTS = {"qwen2_moe": False, "qwen3_moe": True}
_ROTARY_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def refusal(model_type: str, config: Any) -> str | None:
    """Return what llama.cpp would compute otherwise than transformers, ``None`` if it computes the same.

    Args:
        model_type: The family.
        config: The model's configuration (its part for text).
    """
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or config.activation
    if activation not in _ACTIVATIONS.get(model_type, ("silu",)):
        return f"llama.cpp has no {activation} activation in this family"
    for found in (_gemma_refusal, _mixture_refusal, _layout_refusal, _rotary_refusal):
        reason = found(model_type, config)
        if reason is not None:
            return reason
    return None


def _gemma_refusal(model_type: str, config: Any) -> str | None:
    if model_type not in _SLIDING_PATTERNS:
        return None
    every = _SLIDING_PATTERNS[model_type]
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        return f"llama.cpp lets one of {every} layers look at everything, this model other ones"
    largest = config.num_hidden_layers == _LARGEST_GEMMA[model_type]
    expected = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != expected:
        return f"llama.cpp scales queries by {expected}, this model by {config.query_pre_attn_scalar}"
    is_capped = config.attn_logit_softcapping is not None
    if is_capped != (model_type == "gemma2") or (is_capped and config.final_logit_softcapping is None):
        return "llama.cpp has soft caps of attention and logits with Gemma 2, and no cap of attention with Gemma 3"
    return None


def _mixture_refusal(model_type: str, config: Any) -> str | None:
    if model_type not in _NORMALIZES_EXPERTS:
        return None
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        return "llama.cpp wants experts in every layer"
    if bool(config.norm_topk_prob) != _NORMALIZES_EXPERTS[model_type]:
        return f"llama.cpp does not compute norm_topk_prob: {config.norm_topk_prob} in this family"
    return None


def _layout_refusal(model_type: str, config: Any) -> str | None:
    if model_type == "falcon" and (config.alibi or not config.parallel_attn):
        return "llama.cpp knows Falcon with rotary embeddings, and the MLP beside the attention"
    if model_type == "phi" and config.qk_layernorm:
        return "llama.cpp has no norms of queries and keys in this family"
    return None


def _rotary_refusal(model_type: str, config: Any) -> str | None:
    for name, rope in _rotary_settings(config).items():
        kind = rope["rope_type"]
        allowed = {"longrope": ("phi3",), "llama3": ("llama", "mistral", "mixtral")}.get(kind, (model_type,))
        plain = name != "sliding_attention" or kind == "default"
        if kind not in _ROTARY_TYPES or model_type not in allowed or not plain:
            return f"llama.cpp has no rotary embeddings of type {kind} in this family"
        if kind == "yarn" and (rope.get("attention_factor") or rope.get("mscale") or not rope.get("truncate", True)):
            return "llama.cpp has no yarn with attention_factor, mscale or without truncation"
        if kind == "longrope" and (rope.get("attention_factor") or rope.get("factor")):
            return "llama.cpp has no longrope with attention_factor or factor"
    return None


def hyperparameters(model_type: str, config: Any, heads: AttentionShape) -> dict[str, Value]:
    """Return what llama.cpp has to know of a model, by keys without the architecture that they begin with.

    Args:
        model_type: The family.
        config: The model's configuration (its part for text).
        heads: Its heads.
    """
    values: dict[str, Value] = {
        "context_length": _context_length(model_type, config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "ffn_hidden_size", None) or config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": heads.heads,
        "attention.head_count_kv": heads.kv_heads,
        "attention.key_length": heads.head_dim,
        "attention.value_length": heads.head_dim,
        "rope.dimension_count": heads.head_dim if heads.rotary_dim is None else heads.rotary_dim,
    }
    values |= _norms(config) | _rotary(config)
    if model_type in _SLIDING_PATTERNS:
        values["attention.sliding_window"] = config.sliding_window
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, name) is not None:
                values[name] = float(getattr(config, name))
    return values | _experts(config)


def _context_length(model_type: str, config: Any) -> int:
    """Return the positions; where llama.cpp has no sliding window in a family, only as many as the first window has."""
    positions = int(config.max_position_embeddings)
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    slides = window > 0 and (kinds is None or "sliding_attention" in kinds)
    return min(positions, window) if slides and model_type not in _SLIDING_PATTERNS else positions


def _norms(config: Any) -> dict[str, Value]:
    if hasattr(config, "rms_norm_eps"):
        return {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}
    epsilon = config.layer_norm_eps if hasattr(config, "layer_norm_eps") else config.layer_norm_epsilon
    return {"attention.layer_norm_epsilon": float(epsilon)}


def _experts(config: Any) -> dict[str, Value]:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return {}
    values: dict[str, Value] = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if hasattr(config, "moe_intermediate_size"):
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if hasattr(config, "shared_expert_intermediate_size"):
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return values


def _rotary_settings(config: Any) -> dict[str, dict[str, Any]]:
    """Return the settings of rotary embeddings by kind of layer."""
    settings = config.rope_parameters
    return dict(settings) if "full_attention" in settings else {"full_attention": settings}


def _rotary(config: Any) -> dict[str, Value]:
    settings = _rotary_settings(config)
    rope = settings["full_attention"]
    values: dict[str, Value] = {"rope.freq_base": float(rope["rope_theta"])}
    if "sliding_attention" in settings:
        values["rope.freq_base_swa"] = float(settings["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = _original_positions(config, rope)
        values["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        values["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    if rope["rope_type"] == "longrope":
        original = _original_positions(config, rope)
        stretch = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        values |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": factor,
        }
    return values


def _original_positions(config: Any, rope: dict[str, Any]) -> int:
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def rotary_tensors(config: Any, heads: AttentionShape) -> dict[str, Tensor]:
    """Return divisors of the rotary frequencies, float32 ``[rotary_dim / 2]``, by their names in the file.

    Args:
        config: The model's configuration (its part for text).
        heads: Its heads.
    """
    rope = _rotary_settings(config)["full_attention"]
    if rope["rope_type"] == "longrope":
        kinds = ("long", "short")
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in kinds}
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, heads.head_dim)}
    return {}


def _llama3_divisors(rope: dict[str, Any], channels: int) -> Tensor:
    """Long waves are divided by the factor, short ones by one, those between by what lies between (Llama 3.1)."""
    frequencies = rope["rope_theta"] ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((waves - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / (share + (1 - share) / rope["factor"])
    return divisors.float()
