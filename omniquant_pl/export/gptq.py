"""GPTQ checkpoints, version 2, which transformers loads with gptqmodel and optimum.

Read in gptqmodel 7.6 (``nn_modules/qlinear``) and optimum 2.3 (``gptq/quantizer.py``). Codes and zero points are one
little-endian bit stream each, codes down the input channels, zero points along the output channels. Version 1 stores
zero points less one, which carries into the neighbours of a zero point 0. auto-round reads version 1 only; it tells
version 2 by the key ``meta`` and refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from omniquant_pl import __version__, ops
from omniquant_pl.checkpoint import Checkpoint
from omniquant_pl.export.codes import unsigned_codes
from omniquant_pl.export.folded import LinearWeight, ModelTensors
from omniquant_pl.export.format import Client, Limits
from omniquant_pl.export.safetensors import SafetensorsExport, Stored
from omniquant_pl.export.structure import (
    expert_linears,
    first_refusal,
    ragged_refusal,
    rewritten_linears,
    unquantized_matrices,
)
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.affine import QuantizedWeight, group_size_of
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.spec import Scheme, WeightSpec

__all__ = ["GptqExport"]

_WIDTHS = (2, 3, 4, 8)
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


@torch.no_grad()
def _logits(folder: Path, tokens: Tensor) -> Tensor:
    """As transformers computes them with gptqmodel's kernel in float32.

    gptqmodel holds scales and biases in float16, whatever dtype transformers is told. That holds our scales exactly,
    and as they are float32 codes times scales are no more rounded. Biases, which it rounds, are read once more.

    Args:
        folder: An exported folder.
        tokens: Token ids ``[batch, tokens]``.

    Returns:
        Logits ``[batch, tokens, vocabulary]``, float32.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "qweight"):
            module.float()
    model.load_state_dict(_biases(folder, model), strict=False)
    logits: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _biases(folder: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Biases as they are stored, by their names in the model."""
    checkpoint = Checkpoint(folder, "output")
    stored = checkpoint.read(tuple(name for name in checkpoint.names() if name.endswith(".bias")))
    own = model.state_dict().keys()
    return {name if name in own else f"{model.base_model_prefix}.{name}": tensor for name, tensor in stored.items()}


class GptqExport(SafetensorsExport):
    """Writes a folder whose linears are ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    ``config.json`` asks for gptqmodel's ``torch`` kernel. Left to choose, it takes one for 4 bit on the CPU that is off
    by 2e-3 and that fails without groups.
    """

    name = "gptq"
    description = "for transformers with gptqmodel"
    limits = Limits(
        weights="2, 3, 4, 8 bit of one width; groups of 16 to 1024 that divide the rows, or none; version 2",
        activations="16 bit only",
        loaded_by="[transformers](deployment.md#transformers) with gptqmodel and optimum",
    )
    clients = (Client("transformers with gptqmodel", ("transformers", "gptqmodel", "optimum"), _logits),)

    @override
    def refusal(self, model: OmniQuantModel) -> str | None:
        return _scheme_refusal(model.scheme) or _shape_refusal(model) or _module_refusal(model)

    @override
    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        (rows, columns), bits = linear.shape, linear.spec.bits
        groups = columns // group_size_of(linear.spec, columns)
        return {
            "qweight": ((ops.words_per_row(columns, bits, "stream"), rows), torch.int32),
            "qzeros": ((groups, ops.words_per_row(rows, bits, "stream")), torch.int32),
            "scales": ((groups, rows), torch.float16),
            "g_idx": ((columns,), torch.int32),
        }

    @override
    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        bits, columns = linear.spec.bits, linear.shape[1]
        codes, zero_point = unsigned_codes(weight, bits)
        return {
            "qweight": ops.pack(codes, bits, "stream").T.contiguous(),
            "qzeros": ops.pack(zero_point.T.contiguous(), bits, "stream"),
            "scales": weight.scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // weight.group_size,
        }

    @override
    def quantization_config(self, model: OmniQuantModel) -> Mapping[str, Any]:
        weights = model.scheme.weights
        (bits,) = _widths(model)
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": bits,
            "group_size": weights.group_size or -1,
            "sym": weights.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "backend": "torch",
            "meta": {"quantizer": [f"omniquant-pl:{__version__}"]},
        }

    @override
    def held_in(self, tensors: ModelTensors, name: str) -> Narrowing | None:
        """Its programs multiply codes and scales, and add biases, in float16 whatever they are told."""
        if name.rpartition(".")[0] in tensors.linears:
            return self.fixed(torch.float16)
        return super().held_in(tensors, name)

    @override
    def storage(self, model: OmniQuantModel) -> str:
        (bits,) = _widths(model)
        return (
            "Weights are stored as GPTQ codes, checkpoint format gptq_v2. Transformers loads them with gptqmodel and "
            "optimum, and computes with the `torch` kernel of gptqmodel, which is exact but for biases, rounded to "
            f"float16; a faster one is chosen by "
            f'`quantization_config=GPTQConfig(bits={bits}, backend="auto")`.'
        )


def _widths(model: OmniQuantModel) -> set[int]:
    return {spec.bits for spec, _ in model.quantized_weights.values()}


def _scheme_refusal(scheme: Scheme) -> str | None:
    weights = scheme.weights
    if scheme.activations is not None:
        return "the scheme quantizes activations, and the format holds weights only"
    if weights.scale_dtype != "float16":
        return f"its scales are float16, not {weights.scale_dtype}"
    if weights.group_size not in (None, *_GROUP_SIZES):
        known = ", ".join(str(size) for size in _GROUP_SIZES)
        return f"model.weights.group_size is {weights.group_size}; its programs know {known} and null"
    return None


def _shape_refusal(model: OmniQuantModel) -> str | None:
    widths = _widths(model)
    if len(widths) > 1:
        return "transformers loads one width for all linears, and model.weights.bits_of gives several"
    (bits,) = widths
    if bits not in _WIDTHS:
        return f"its programs know 2, 3, 4 and 8 bit, not {bits}"
    return first_refusal(model, ragged_refusal) or first_refusal(model, _word_refusal)


def _word_refusal(spec: WeightSpec, shape: tuple[int, ...]) -> str | None:
    if spec.bits == 3 and any(size % 32 for size in shape):
        return f"at 3 bit its programs read multiples of 32 channels, not {' by '.join(map(str, shape))}"
    return None


def _module_refusal(model: OmniQuantModel) -> str | None:
    if expert_linears(model.source):
        return "transformers holds experts as 3-D weights, which gptqmodel does not replace"
    if rewritten := rewritten_linears(model.source):
        return f"transformers replaces plain linears only, not {', '.join(sorted(rewritten))}"
    if others := unquantized_matrices(model.source):
        return f"transformers would look for codes of {', '.join(sorted(others))}, which is not quantized"
    return None
