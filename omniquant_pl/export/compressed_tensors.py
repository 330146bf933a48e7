"""compressed-tensors checkpoints, which transformers loads: packed codes, or int8 codes and quantized activations.

What is refused, and what is done about experts and attention, was read in compressed-tensors 0.20
(``quantization/lifecycle``, ``modeling/attention.py``) and transformers 5.22 (``integrations/compressed_tensors.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from omniquant_pl.export.clients import transformers_logits
from omniquant_pl.export.compressed_tensors_config import attention_classes, describe, linear_kinds
from omniquant_pl.export.compressed_tensors_layouts import IntQuantized, PackQuantized
from omniquant_pl.export.folded import LinearWeight, ModelTensors
from omniquant_pl.export.format import Client, Limits
from omniquant_pl.export.safetensors import SafetensorsExport, Stored
from omniquant_pl.export.structure import expert_linears, first_refusal, ragged_refusal, rewritten_linears
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.affine import QuantizedWeight
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.run.folder import RunFolder

__all__ = ["CompressedTensorsExport"]

_HALF_ROUNDING = 2e-3  # of logits, with products of codes and scales in float16; 1e-3 was seen
_ATTENTION_LINEARS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")


def _dequantizes_in_half() -> bool:
    """Return whether transformers multiplies codes and scales in the scales' dtype, as from 5.23 on."""
    return tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 23)


def _logits(folder: Path, tokens: Tensor) -> Tensor:
    """As transformers computes them: float32; float64 where activations are quantized.

    compressed-tensors adds the zero point of an activation before it rounds, not after, so that in float32 some values
    get the code beside. In float64 they do not.

    Args:
        folder: An exported folder.
        tokens: Token ids ``[batch, tokens]``.

    Returns:
        Logits ``[batch, tokens, vocabulary]``.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if config["format"] == IntQuantized.name:
        return transformers_logits(folder, tokens, torch.float64)
    has_zero_points = not config["config_groups"]["group_0"]["weights"]["symmetric"]
    if has_zero_points and _dequantizes_in_half():  # it refuses them as they are
        from transformers import CompressedTensorsConfig

        dequantized = CompressedTensorsConfig(dequantize=True)
        return transformers_logits(folder, tokens, quantization_config=dequantized)
    return transformers_logits(folder, tokens)


class CompressedTensorsExport(SafetensorsExport):
    """Writes pack-quantized weights, and int-quantized ones where the scheme quantizes activations.

    Activations are described so that transformers quantizes the inputs of linears and of attention as the calibration
    did. vLLM leaves out entries for attention.
    """

    name = "compressed-tensors"
    description = "for transformers with that package and for vLLM, activations as well"
    limits = Limits(
        weights="2 to 8 bit, groups that divide the rows, or none",
        activations="as in the scheme",
        loaded_by="[transformers](deployment.md#transformers) with that package; the format is "
        "[vLLM](deployment.md#vllm)'s own",
    )
    clients = (
        Client(
            "transformers with compressed-tensors",
            ("transformers", "compressed_tensors"),
            _logits,
            _HALF_ROUNDING if _dequantizes_in_half() else 1e-4,
            quantizes_activations=True,
        ),
    )

    _layout: PackQuantized | IntQuantized = PackQuantized()

    @override
    def refusal(self, model: OmniQuantModel) -> str | None:
        return _linear_refusal(model) or _expert_refusal(model) or _activation_refusal(model)

    @override
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        self._layout = _layout_of(model)
        super().write(model, run, output)

    @override
    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        return self._layout.stored(linear)

    @override
    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        return self._layout.pack(weight, linear)

    @override
    def held_in(self, tensors: ModelTensors, name: str) -> Narrowing | None:
        """Its programs multiply codes and scales in the scales' dtype."""
        linear = tensors.linears.get(name.removesuffix(".weight"))
        if linear is not None and self._layout.scale_dtype_of(linear) == torch.float16:
            return self.fixed(torch.float16)
        return super().held_in(tensors, name)

    @override
    def quantization_config(self, model: OmniQuantModel) -> Mapping[str, Any]:
        return describe(model, _layout_of(model).name)

    @override
    def _config(self, model: OmniQuantModel) -> dict[str, Any]:
        """Add the number of heads where the program looks for it and the family has another name for it, as OPT."""
        config = super()._config(model)
        if model.scheme.activations is None or hasattr(model.source.config, "num_key_value_heads"):
            return config
        return config | {"num_key_value_heads": model.source.attention.kv_heads}

    @override
    def storage(self, model: OmniQuantModel) -> str:
        layout = _layout_of(model)
        sentence = f"Weights are stored by compressed-tensors, {layout.name}; transformers loads them with that package"
        if isinstance(layout, IntQuantized) or model.scheme.weights.symmetric:
            return f"{sentence}."
        option = "`quantization_config=CompressedTensorsConfig(dequantize=True)`"
        return f"{sentence}, from version 5.23 on with {option}."


def _layout_of(model: OmniQuantModel) -> PackQuantized | IntQuantized:
    if model.scheme.activations is not None:
        return IntQuantized()
    # transformers multiplies experts' codes and scales in the dtype that scales are stored in.
    return PackQuantized(torch.float32 if expert_linears(model.source) else None)


def _linear_refusal(model: OmniQuantModel) -> str | None:
    if rewritten := rewritten_linears(model.source):
        return f"compressed-tensors unpacks plain linears only, not {', '.join(sorted(rewritten))}"
    return first_refusal(model, ragged_refusal)


def _expert_refusal(model: OmniQuantModel) -> str | None:
    experts = expert_linears(model.source)
    if not experts:
        return None
    if model.scheme.activations is not None:
        return "transformers does not quantize what experts get"
    if not model.scheme.weights.symmetric:
        return "transformers reads no zero points of experts; model.weights.symmetric needs none"
    if sum(not experts.isdisjoint(names) for names in linear_kinds(model).values()) > 1:
        return "transformers reads one width and group size for all linears of experts"
    return None


def _activation_refusal(model: OmniQuantModel) -> str | None:
    activations = model.scheme.activations
    if activations is None:
        return None
    if activations.symmetric:
        return "its programs divide the largest of symmetric activations by 2^(bits - 1) - 1/2, not by 2^(bits - 1) - 1"
    if model.source.family.attention is not None:
        return "its programs cannot quantize what attention gets in families with attention code of their own"
    for name, attention in attention_classes(model.source).items():
        if not any(hasattr(attention, linear) for linear in _ATTENTION_LINEARS) or "attention" not in name.lower():
            return f"its programs do not quantize what {name} gets"
        if _caps_logits(attention):
            return f"its programs do not quantize what {name} gets, which caps its logits"
    return None


def _caps_logits(attention: nn.Module) -> bool:
    """Return whether attention needs transformers' eager implementation, which cannot be wrapped."""
    return getattr(attention, "attn_logit_softcapping", None) is not None
