"""Folders of weights for MLC-LLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export.card import model_card
from omniquant_pl.export.folded import FoldedModel, FoldedTensors, ModelTensors
from omniquant_pl.export.folder import atomic_directory, copy_auxiliary_files
from omniquant_pl.export.format import Client, Export, Limits
from omniquant_pl.export.mlc_cache import write_tensor_cache
from omniquant_pl.export.mlc_codes import pack_codes, weight_refusal
from omniquant_pl.export.mlc_models import FAMILIES, MlcFamily, model_config, model_refusal
from omniquant_pl.export.remote_code import RemoteCode
from omniquant_pl.export.structure import first_refusal, is_tied, model_type
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_json, write_text

__all__ = ["MlcExport"]

_QUANTIZATION = "q4f16_2"
_LARGEST_SHARD = 32 * 2**20  # as MLC-LLM writes them: browsers load them too
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
_SAMPLING = ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_p")
_STORAGE = (
    f"The weights are for MLC-LLM, quantization {_QUANTIZATION}: 4.5 bits a weight, which hold codes, scales and zero "
    "points without rounding; embedding, head and everything else are float16. MLC-LLM computes in float16, and so "
    "rounds each weight once more when it dequantizes it. Compile the model library for your device with `mlc_llm "
    "compile mlc-chat-config.json`; for a chat model put its template under `conv_template` there first."
)


def _needs_compiling(folder: Path, tokens: Tensor) -> Tensor:
    raise ConfigurationError(
        "verify", "MLC-LLM computes logits with a model library only, which is compiled per device"
    )


class MlcExport(Export):
    """Writes what ``mlc_llm convert_weight`` and ``gen_config`` write, with our codes in the place of its own.

    2 and 3 bit fit, and 4 bit symmetric, with groups of a multiple of 32 channels or one per output channel.
    Everything that is not quantized is stored in float16, which is all that the format has.
    """

    name = "mlc"
    description = "weights for MLC-LLM"
    limits = Limits(
        weights="2 and 3 bit, 4 bit symmetric; groups of a multiple of 32, or none",
        activations="computed in float16",
        loaded_by="[MLC-LLM](deployment.md#mlc-llm)",
    )
    library = "mlc-llm"
    clients = (Client("MLC-LLM", ("mlc_llm",), _needs_compiling),)

    @override
    def refusal(self, model: OmniQuantModel) -> str | None:
        source = model.source
        if self.dtype not in (None, "float16"):
            return f"{_QUANTIZATION} has no {self.dtype}, only float16"
        reason = model_refusal(model_type(source), source.config, is_tied(source))
        return reason or first_refusal(model, weight_refusal) or source.found_tokenizer.complaint

    @override
    def kept_dtypes(self, tensors: ModelTensors) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(tensors.kept_names(), torch.float16)

    @override
    def keeping(self, dtype: torch.dtype) -> Narrowing:
        return self.fixed(dtype)

    @override
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        source, folded = model.source, FoldedModel(model, run)
        names = [*folded.non_block_names, *(name for i in range(len(folded)) for name in folded.block_names(i))]
        weights = sum(torch.Size(folded.shape(name)).numel() for name in names)
        with atomic_directory(output, run.path, source.folder) as target:
            tensors = _tensors(folded, FAMILIES[model_type(source)], self.fixed(torch.float16))
            write_tensor_cache(target, tensors, weights, min(self.shard_bytes, _LARGEST_SHARD))
            code = RemoteCode(source.folder, model.trust_remote_code)
            copy_auxiliary_files(source.folder, target, code)
            write_json(target / "mlc-chat-config.json", _chat_config(source, target))
            card = model_card(model, run, _STORAGE, library=self.library, code_note=code.note)
            write_text(target / "README.md", card)


def _tensors(folded: FoldedModel, family: MlcFamily, half: Narrowing) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors by MLC-LLM's names, with one block in memory at a time."""
    source = folded.source
    names = {"embed_tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for name, tensor in folded.non_block_tensors():
        own = names.get(name.removeprefix("model."), name)
        # No parameter of MLC-LLM is an integer.
        is_unread = name.endswith(".inv_freq") or not tensor.is_floating_point()
        if not (is_unread or (own == "lm_head.weight" and is_tied(source))):
            yield own, half.cast(name, tensor)
    for index in range(len(folded)):
        prefix, block = source.block_prefix(index), folded.block(index)
        for name, tensor in _block(source.stored_names(index), block, folded, family, half):
            yield prefix + name, tensor
        del block, tensor


def _block(
    stored: Mapping[str, str], block: FoldedTensors, folded: FoldedModel, family: MlcFamily, half: Narrowing
) -> Iterator[tuple[str, Tensor]]:
    """Yield a block's tensors by their names in it, fused ones where the first of them stands."""
    fused = {part: (own, parts) for own, parts in family.fused.items() for part in parts}
    for name in stored:
        module, _, leaf = name.rpartition(".")
        own, parts = fused.get(module, (module, (module,)))
        if module != parts[0]:
            continue
        names = [stored[f"{part}.{leaf}"] for part in parts]
        linears = [linear.removesuffix(".weight") for linear in names]
        if linears[0] in block.weights:
            packed = [_pack(block.weights[linear], linear, folded, half) for linear in linears]
            yield f"{own}.q_weight", torch.cat([words for words, _ in packed])
            yield f"{own}.q_scale", torch.cat([scale for _, scale in packed])
        else:
            yield f"{own}.{leaf}", torch.cat([half.cast(part, block.tensors[part]) for part in names])


def _pack(weight: QuantizedWeight, linear: str, folded: FoldedModel, half: Narrowing) -> tuple[Tensor, Tensor]:
    half.cast(f"a scale of {linear}.weight", weight.scale, is_exact=True)
    half.check_weight(f"{linear}.weight", weight.scale, weight.dequantize)  # MLC-LLM dequantizes to float16
    return pack_codes(weight, folded.linears[linear].spec)


def _chat_config(source: SourceModel, folder: Path) -> dict[str, Any]:
    """Return ``mlc-chat-config.json``; the keys are those of mlc_llm/protocol/mlc_chat_config.py."""
    tokenizer, config = (
        source.tokenizer,
        model_config(model_type(source), source.config, source.attention, is_tied(source)),
    )
    generation = _read_json(folder / "generation_config.json")
    special = {key: generation.get(key, getattr(source.config, key, None)) for key in ("bos_token_id", "eos_token_id")}
    return {
        "version": "0.1.0",
        "model_type": model_type(source),
        "quantization": _QUANTIZATION,
        "model_config": config,
        "vocab_size": config["vocab_size"],
        "context_window_size": config["context_window_size"],
        "sliding_window_size": config.get("sliding_window_size", -1),
        "prefill_chunk_size": config["prefill_chunk_size"],
        "attention_sink_size": config.get("attention_sink_size", -1),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": config["vocab_size"] if tokenizer is None else len(tokenizer),
        **{
            key: generation.get(key, 1.0 if key in ("temperature", "repetition_penalty", "top_p") else 0.0)
            for key in _SAMPLING
        },
        "tokenizer_files": [name for name in _TOKENIZER_FILES if (folder / name).is_file()],
        "tokenizer_info": _tokenizer_info(_read_json(folder / "tokenizer.json")),
        "conv_template": _plain_template(special["bos_token_id"], special["eos_token_id"]),
        "pad_token_id": generation.get("pad_token_id", getattr(source.config, "pad_token_id", None)) or 0,
        **special,
    }


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _tokenizer_info(state: Mapping[str, Any]) -> dict[str, Any]:
    """Say how tokens become text, as cpp/tokenizers/tokenizers.cc finds it out."""
    decoders = _steps(state.get("decoder"), "decoders")
    normalizers = _steps(state.get("normalizer"), "normalizers")
    is_byte_level = any(step["type"] == "ByteLevel" for step in decoders)
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "token_postproc_method": "byte_level" if is_byte_level else "byte_fallback",
        "prepend_space_in_encode": {"type": "Prepend", "prepend": "▁"} in normalizers,
        "strip_space_in_decode": strip in decoders,
    }


def _steps(component: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _plain_template(bos: int | None, eos: int | list[int] | None) -> dict[str, Any]:
    """Return a conversation that is nothing but its text."""
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return {
        "name": "LM",
        "system_template": "{system_message}",
        "system_message": "",
        "system_prefix_token_ids": None if bos is None else [bos],
        "add_role_after_system_message": False,
        "roles": {"user": "", "assistant": ""},
        "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
        "messages": [],
        "seps": [""],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": stops,
        "function_string": "",
        "use_function_calling": False,
    }
