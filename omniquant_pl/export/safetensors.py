"""What the formats have in common that keep transformers' folder and store the quantized linears in another way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.export.card import model_card
from omniquant_pl.export.config import config_of
from omniquant_pl.export.folded import FoldedModel, LinearWeight, ModelTensors
from omniquant_pl.export.folder import atomic_directory, copy_auxiliary_files
from omniquant_pl.export.format import Export, StorageDtype
from omniquant_pl.export.remote_code import RemoteCode
from omniquant_pl.export.shards import ShardWriter, Stored
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_json, write_text

__all__ = ["SafetensorsExport", "Stored"]


class SafetensorsExport(Export):
    """A model folder whose linears are stored as several tensors, ``<linear>.<suffix>``."""

    @abstractmethod
    def stored(self, linear: LinearWeight) -> Mapping[str, Stored]:
        """Return what :meth:`pack` will return, by suffix, before anything has been read."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight, linear: LinearWeight) -> Mapping[str, Tensor]:
        """Return the tensors of one quantized weight by suffix."""

    @abstractmethod
    def quantization_config(self, model: OmniQuantModel) -> Mapping[str, Any] | None:
        """Return what stands under ``quantization_config`` in ``config.json``; ``None`` for nothing."""

    @abstractmethod
    def storage(self, model: OmniQuantModel) -> str:
        """Return one sentence for the model card: how weights are stored and what loads them."""

    def dtype_of(self, tensors: ModelTensors, name: str) -> torch.dtype:
        """Return what a tensor that is not quantized is stored in."""
        if self.dtype is None:
            return tensors.exact_dtype(name)
        dtype: torch.dtype = getattr(torch, self.dtype)
        return tensors.integer_dtype(name) or dtype

    @override
    def kept_dtypes(self, tensors: ModelTensors) -> Mapping[str, torch.dtype]:
        return {name: self.dtype_of(tensors, name) for name in tensors.kept_names()}

    def config_dtype(self, config: Mapping[str, Any]) -> str:
        """Return the dtype that a program computes in unless told otherwise: the source's own, or the one asked for.

        Args:
            config: The source's ``config.json``.
        """
        own = config.get("dtype") or config.get("torch_dtype")
        return self.dtype or next((known for known in get_args(StorageDtype) if known == own), "float32")

    @override
    def held_in(self, tensors: ModelTensors, name: str) -> Narrowing | None:
        """Programs compute in the dtype that ``config.json`` states."""
        dtype = getattr(torch, self.config_dtype(tensors.source.config_json))
        return replace(self.asked(dtype), reason="" if self.dtype else ", the dtype in config.json")

    @override
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        folded = FoldedModel(model, run)
        with atomic_directory(output, run.path, model.source.folder) as target:
            writer = ShardWriter(target, self._planned(folded), self.shard_bytes)
            writer.add(self._tensors(folded))
            writer.finish()
            code = RemoteCode(model.source.folder, model.trust_remote_code)
            write_json(target / "config.json", code.carried(self._config(model)))
            copy_auxiliary_files(model.source.folder, target, code)
            quantizes = any(client.quantizes_activations for client in self.clients)
            card = model_card(model, run, self.storage(model), quantizes, self.library, code.note)
            write_text(target / "README.md", card)

    def _planned(self, folded: FoldedModel) -> dict[str, Stored]:
        """Return what will be stored, in the order of :meth:`_tensors`."""
        planned: dict[str, Stored] = {}
        dtypes = self.kept_dtypes(folded)
        names = [*folded.non_block_names, *(name for i in range(len(folded)) for name in folded.block_names(i))]
        for name in names:
            linear = folded.linears.get(name.removesuffix(".weight"))
            if linear is None:
                planned[name] = (folded.shape(name), dtypes[name])
            else:
                stored = self.stored(linear)
                planned |= {f"{name.removesuffix('.weight')}.{suffix}": what for suffix, what in stored.items()}
        return planned

    def _tensors(self, folded: FoldedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in folded.non_block_tensors():
            yield name, self.kept(folded, name, tensor, self.dtype_of(folded, name))
        for index in range(len(folded)):
            yield from self._block_tensors(folded, index)

    def _block_tensors(self, folded: FoldedModel, index: int) -> Iterator[tuple[str, Tensor]]:
        block = folded.block(index)
        for name in folded.block_names(index):
            linear = name.removesuffix(".weight")
            if linear in block.weights:
                weight, held = block.weights[linear], self.held_in(folded, name)
                if held is not None:
                    held.check_weight(name, weight.scale, weight.dequantize)
                packed = self.pack(weight, folded.linears[linear])
                yield from ((f"{linear}.{suffix}", tensor) for suffix, tensor in packed.items())
            else:
                yield name, self.kept(folded, name, block.tensors[name], self.dtype_of(folded, name))

    def _config(self, model: OmniQuantModel) -> dict[str, Any]:
        """Return the source's own configuration with the dtype and how it is quantized."""
        source = model.source.config_json
        config = config_of(source, self.config_dtype(source))
        quantization = self.quantization_config(model)
        return config if quantization is None else config | {"quantization_config": dict(quantization)}
