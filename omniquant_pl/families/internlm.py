"""InternLM 1, 2 and 3, opened as the LLaMA that they are: no code of the checkpoint runs, and a LLaMA is exported.

What differs was read in InternLM's own code. InternLM and InternLM2: ``modeling_internlm.py``,
``modeling_internlm2.py`` and the configurations beside them (github.com/InternLM/InternEvo, folder transformers) and
``tools/convert2llama.py`` (github.com/InternLM/InternLM); InternLM3: ``modeling_internlm3.py`` of its checkpoints.

- InternLM has LLaMA's tensors, with biases in attention, and its rotary settings under ``rotary``.
- InternLM2 has one ``wqkv`` whose rows are, kv head after kv head, its query heads, its key and its value; ``w1``,
  ``w3`` and ``w2`` are gate, up and down projection. Rotary settings are LLaMA's.
- InternLM3 has LLaMA's tensors; ``qkv_bias`` and ``bias`` say which linears have biases, not always all that LLaMA's
  ``attention_bias`` stands for. A bias that is missing is zero.

Which biases there are is taken from the stored tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families.conversion import Converted, Shapes, StoredPart, register_conversion
from omniquant_pl.transform import AttentionShape, Part

__all__: list[str] = []

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_theta",
    "dtype",
    "torch_dtype",
    "quantization_config",
)
_ATTENTION = tuple(f".self_attn.{kind}_proj." for kind in ("q", "k", "v", "o"))
_MLP = tuple(f".mlp.{kind}_proj." for kind in ("gate", "up", "down"))
_INTERNLM2_NAMES = (
    ("tok_embeddings.", "embed_tokens."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)


def _like_llama(config: Mapping[str, Any], shapes: Shapes) -> Converted:
    """InternLM and InternLM3."""
    tensors = {name: StoredPart(name) for name in _stored(shapes)}
    for linears in (_ATTENTION, _MLP):
        biases = {_bias_of(name): shapes[name][:1] for name in tensors if _is_of(name, linears, "weight")}
        if any(bias in tensors for bias in biases):
            tensors |= {bias: StoredPart(None, zeros=shape) for bias, shape in biases.items() if bias not in tensors}
    return Converted(_llama_config(config, tensors), tensors)


def _internlm2(config: Mapping[str, Any], shapes: Shapes) -> Converted:
    tensors: dict[str, StoredPart] = {}
    for name in _stored(shapes):
        if ".attention.wqkv." in name:
            tensors |= _queries_keys_values(name, _heads(config), shapes[name][0])
        else:
            tensors[_internlm2_name(name)] = StoredPart(name)
    return Converted(_llama_config(config, tensors), tensors)


def _queries_keys_values(name: str, heads: AttentionShape, rows: int) -> dict[str, StoredPart]:
    expected = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
    if rows != expected:
        raise ConfigurationError("model.path", f"{name} has {rows} rows, not {expected} as config.json says")
    before, _, leaf = name.partition("attention.wqkv.")
    kinds = (Part(name, "query", "grouped"), Part(name, "key", "grouped"), Part(name, "value", "grouped"))
    return {
        f"{before}self_attn.{part.kind[0]}_proj.{leaf}": StoredPart(name, (part.rows(heads, rows),)) for part in kinds
    }


def _internlm2_name(name: str) -> str:
    for own, other in _INTERNLM2_NAMES:
        name = name.replace(own, other)
    return f"lm_head.{name.removeprefix('output.')}" if name.startswith("output.") else name


def _llama_config(config: Mapping[str, Any], tensors: Mapping[str, StoredPart]) -> dict[str, Any]:
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise ConfigurationError("model.path", f"config.json of an {config['model_type']} model lacks {missing[0]}")
    rope = _rope_scaling(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: config[key] for key in (*_REQUIRED, *_OPTIONAL) if config.get(key) is not None},
        "attention_bias": any(_is_of(name, _ATTENTION, "bias") for name in tensors),
        "mlp_bias": any(_is_of(name, _MLP, "bias") for name in tensors),
        **({"rope_theta": config["rotary"]["base"]} if "rotary" in config else {}),
        **({"rope_scaling": rope} if rope else {}),
    }


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return scaled rotary embeddings in LLaMA's words, from those of any of the three."""
    rotary, scaling = config.get("rotary"), config.get("rope_scaling")
    if rotary and rotary["type"] != "origin":
        return {"rope_type": rotary["type"], "factor": rotary.get("scaling_factor", 1.0)}
    if scaling:
        return {"rope_type": scaling.get("rope_type", scaling.get("type")), "factor": scaling["factor"]}
    return None


def _heads(config: Mapping[str, Any]) -> AttentionShape:
    heads = config["num_attention_heads"]
    return AttentionShape(heads, config.get("num_key_value_heads") or heads, config["hidden_size"] // heads)


def _stored(shapes: Shapes) -> list[str]:
    """Return the names of the stored tensors, without rotary frequencies, which are computed."""
    return [name for name in shapes if not name.endswith(".inv_freq")]


def _is_of(name: str, linears: tuple[str, ...], leaf: str) -> bool:
    return name.endswith(tuple(f"{linear}{leaf}" for linear in linears))


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


register_conversion("internlm", _like_llama)
register_conversion("internlm2", _internlm2)
register_conversion("internlm3", _like_llama)
