"""Our own format: codes packed for the products that compute with them, any width, group size and scheme."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from omniquant_pl.export.folded import FoldedModel, LinearWeight, ModelTensors
from omniquant_pl.export.format import Client, Limits
from omniquant_pl.export.safetensors import SafetensorsExport, Stored
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import load_packed
from omniquant_pl.runtime.codec import encode, stored_tensors
from omniquant_pl.runtime.folder import PackedFolder
from omniquant_pl.runtime.model import usable_device, use_generation_config
from omniquant_pl.runtime.scheme import describe_scheme
from omniquant_pl.runtime.skeleton import PackedSkeleton

__all__ = ["PackedExport"]

_TOKENS = 4


@torch.no_grad()
def _logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return a few tokens at a time, as ``generate`` does: of more, products take the dequantized weight.

    In float64 where activations are quantized: packed products take their sums in another order.
    """
    quantizes = PackedFolder(folder).scheme.activations is not None
    network = load_packed(folder, torch.float64 if quantizes else torch.float32)
    logits, past = [], None
    for some in tokens.split(_TOKENS, dim=1):
        output = network(some, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


class PackedExport(SafetensorsExport):
    """Writes a folder that :func:`omniquant_pl.runtime.load_packed` and ``generate`` load."""

    name = "packed"
    description = "codes as `generate` computes with them, any scheme"
    limits = Limits(
        weights="every scheme: 2 to 8 bit, any group; [its layout](packed-format.md)",
        activations="as in the scheme",
        loaded_by="[this project](deployment.md#this-projects-runtime): `generate`, from Python `load_packed`",
    )
    library = "omniquant-pl"
    clients = (Client("omniquant-pl", ("omniquant_pl",), _logits, quantizes_activations=True),)

    @override
    def refusal(self, model: OmniQuantModel) -> None:
        return None

    @override
    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        return stored_tensors(linear.spec, linear.shape)

    @override
    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        return encode(weight, linear.spec)

    @override
    def quantization_config(self, model: OmniQuantModel) -> Mapping[str, Any]:
        return describe_scheme(model.scheme)

    @override
    def held_in(self, tensors: ModelTensors, name: str) -> Narrowing | None:
        """Nothing: ``load_packed`` is told a dtype, and checks it."""
        return None

    @override
    def storage(self, model: OmniQuantModel) -> str:
        return "Weights are stored as packed codes; `omniquant_pl.runtime.load_packed` loads and runs them."

    def in_memory(
        self,
        model: OmniQuantModel,
        run: RunFolder,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PreTrainedModel:
        """Return what :func:`omniquant_pl.runtime.load_packed` would of this export, without writing it.

        One block at a time is folded and packed.

        Raises:
            ConfigurationError: If the run is not finished or is damaged, or there is no such device.
        """
        target = usable_device(device)
        folded = FoldedModel(model, run)
        config = {key: value for key, value in self._config(model).items() if key != "quantization_config"}
        skeleton = PackedSkeleton(config, model.scheme, self._planned(folded).keys(), dtype, target)
        for name, tensor in self._tensors(folded):
            if name in skeleton.slots:
                skeleton.slots[name].put(tensor)
        network = skeleton.finish()
        use_generation_config(network, model.source.folder)
        return network
