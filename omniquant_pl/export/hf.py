"""A plain transformers folder: the folded model with weights dequantized from their codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.export.clients import transformers_logits
from omniquant_pl.export.folded import LinearWeight, ModelTensors
from omniquant_pl.export.format import Client, Limits
from omniquant_pl.export.safetensors import SafetensorsExport, Stored
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight

__all__ = ["HfExport"]


class HfExport(SafetensorsExport):
    """Writes a folder that ``AutoModelForCausalLM.from_pretrained`` loads without code of ours.

    float32, the default, holds ``(code - zero_point) * scale`` exactly.
    """

    name = "hf"
    description = "a plain transformers folder with dequantized weights"
    limits = Limits(
        weights="every scheme, dequantized: no smaller than the original; float32 unless `--dtype` says otherwise",
        activations="computed in 16 bit or more",
        loaded_by="[transformers](deployment.md#transformers) alone, and whatever reads its folders",
    )
    clients = (Client("transformers", ("transformers",), transformers_logits),)

    @property
    def _storage(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype or "float32")
        return dtype

    @override
    def refusal(self, model: OmniQuantModel) -> str | None:
        return None

    @override
    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        return {"weight": (linear.shape, self._storage)}

    @override
    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        return {"weight": weight.dequantize().to(self._storage)}

    @override
    def dtype_of(self, tensors: ModelTensors, name: str) -> torch.dtype:
        return tensors.integer_dtype(name) or self._storage

    @override
    def config_dtype(self, config: Mapping[str, Any]) -> str:
        return self.dtype or "float32"

    @override
    def quantization_config(self, model: OmniQuantModel) -> None:
        return None

    @override
    def storage(self, model: OmniQuantModel) -> str:
        return f"Weights are stored dequantized, as {self.dtype or 'float32'}."
