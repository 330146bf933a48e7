"""What the formats have in common that keep transformers' folder and store the quantized linears in another way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl.export.card import model_card
from omniquant_pl.export.folded import FoldedModel, LinearWeight
from omniquant_pl.export.folder import atomic_directory, copy_auxiliary_files
from omniquant_pl.export.format import Export
from omniquant_pl.export.narrowing import narrowed
from omniquant_pl.export.remote_code import config_for
from omniquant_pl.export.shards import ShardWriter, Stored
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
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

    def dtype_of(self, folded: FoldedModel, name: str) -> torch.dtype:
        """Return what a tensor that is not quantized is stored in."""
        if self.dtype is None:
            return folded.exact_dtype(name)
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def config_dtype(self, config: Mapping[str, Any]) -> str:
        """Return the dtype that a program computes in unless told otherwise: the source's own, or the one asked for.

        Args:
            config: The source's ``config.json``.
        """
        return self.dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @override
    def check_values(self, model: OmniQuantModel) -> None:
        if self.dtype is None:
            return
        for name, tensor in model.source.non_block_tensors():
            narrowed(tensor, getattr(torch, self.dtype), name)

    @override
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        folded = FoldedModel(model, run)
        with atomic_directory(output, run.path, model.source.folder) as target:
            planned = self._planned(folded)
            writer = ShardWriter(target, planned, self.shard_bytes)
            writer.add((name, narrowed(tensor, planned[name][1], name)) for name, tensor in self._tensors(folded))
            writer.finish()
            write_json(target / "config.json", self._config(model))
            copy_auxiliary_files(model.source.folder, target, model.trust_remote_code)
            quantizes = any(client.quantizes_activations for client in self.clients)
            write_text(target / "README.md", model_card(model, run, self.storage(model), quantizes, self.library))

    def _planned(self, folded: FoldedModel) -> dict[str, Stored]:
        """Return what will be stored, in the order of :meth:`_tensors`."""
        planned: dict[str, Stored] = {}
        names = [*folded.non_block_names, *(name for i in range(len(folded)) for name in folded.block_names(i))]
        for name in names:
            linear = folded.linears.get(name.removesuffix(".weight"))
            if linear is None:
                planned[name] = (folded.shape(name), self.dtype_of(folded, name))
            else:
                stored = self.stored(linear)
                planned |= {f"{name.removesuffix('.weight')}.{suffix}": what for suffix, what in stored.items()}
        return planned

    def _tensors(self, folded: FoldedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors in order; those that are not quantized have not been rounded to what is stored yet."""
        yield from folded.non_block_tensors()
        for index in range(len(folded)):
            yield from self._block_tensors(folded, index)

    def _block_tensors(self, folded: FoldedModel, index: int) -> Iterator[tuple[str, Tensor]]:
        block = folded.block(index)
        for name in folded.block_names(index):
            linear = name.removesuffix(".weight")
            if linear in block.weights:
                packed = self.pack(block.weights[linear], folded.linears[linear])
                yield from ((f"{linear}.{suffix}", tensor) for suffix, tensor in packed.items())
            else:
                yield name, block.tensors[name]

    def _config(self, model: OmniQuantModel) -> dict[str, Any]:
        """Return the source's own configuration with the dtype and how it is quantized."""
        source = config_for(model)
        config = {key: value for key, value in source.items() if key != "torch_dtype"}
        config["dtype"] = self.config_dtype(source)
        quantization = self.quantization_config(model)
        return config if quantization is None else config | {"quantization_config": dict(quantization)}
