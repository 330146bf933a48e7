"""A plain transformers folder: the folded model with weights dequantized from their codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from omniquant_pl.checkpoint import BlockCall, SourceModel, write_json, write_text
from omniquant_pl.export.card import model_card
from omniquant_pl.export.folder import copy_companions, whole_folder
from omniquant_pl.export.shards import ShardWriter
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run_folder import RunFolder

__all__ = ["HfExport"]


class HfExport:
    """Writes a folder that ``AutoModelForCausalLM.from_pretrained`` loads without code of ours.

    Args:
        dtype: Name of the storage dtype; float32 holds ``(code - zero_point) * scale`` exactly.
        shard_bytes: Largest size of one safetensors file.
    """

    def __init__(self, dtype: str = "float32", shard_bytes: int = 5_000_000_000) -> None:
        self._dtype_name = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._shard_bytes = shard_bytes

    def write(self, model: OmniQuantModel, folder: RunFolder, output: Path) -> None:
        """Exports a finished run, one block in memory at a time.

        Args:
            model: The run's settings.
            folder: The run, for its learned factors.
            output: The folder to create or replace.
        """
        source = model.source
        with whole_folder(output) as target:
            writer = ShardWriter(target, self._sizes(source), self._shard_bytes)
            writer.add((name, tensor.to(self._dtype)) for name, tensor in self._tensors(model, folder))
            writer.finish()
            write_json(target / "config.json", self._config(source))
            copy_companions(source.folder, target)
            storage = f"Weights are stored dequantized, as {self._dtype_name}."
            write_text(target / "README.md", model_card(model, folder, storage))

    def _sizes(self, source: SourceModel) -> Mapping[str, int]:
        """Bytes of every tensor, in the order of :meth:`_tensors`."""
        names = list(source.surrounding_names)
        for index in range(len(source)):
            names += source.stored_names(index).values()
        return {name: source.describe(name).elements * self._dtype.itemsize for name in names}

    def _tensors(self, model: OmniQuantModel, folder: RunFolder) -> Iterator[tuple[str, Tensor]]:
        source = model.source
        yield from source.surroundings()
        for index in range(len(source)):
            tensors = source.block_tensors(index)
            block = model.folded(index, tensors, BlockCall(), folder.load_factors(index))
            yield from ((stored, block.tensors[name]) for name, stored in source.stored_names(index).items())

    def _config(self, source: SourceModel) -> dict[str, object]:
        """The source's own configuration with the new dtype."""
        config = {key: value for key, value in source.config_json.items() if key != "torch_dtype"}
        return config | {"dtype": self._dtype_name}
