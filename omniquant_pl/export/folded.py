"""A finished run as exports read it: one folded block at a time, under the names of published checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec
from omniquant_pl.utils.memory import return_free_memory

__all__ = ["FoldedModel", "FoldedTensors", "LinearWeight"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LinearWeight:
    """A quantized weight, of which nothing has been read yet.

    Attributes:
        spec: How it is quantized.
        shape: ``(out, in)``.
    """

    spec: WeightSpec
    shape: tuple[int, int]


@dataclass(frozen=True)
class FoldedTensors:
    """What a folded block holds.

    Attributes:
        tensors: Weights and biases that are not quantized, float32, by their names in the checkpoint.
        weights: Codes, scales and zero points by the linear's name in the checkpoint, which lacks ``.weight``.
    """

    tensors: dict[str, Tensor]
    weights: dict[str, QuantizedWeight]


class FoldedModel:
    """Reads a finished run; no more than one block is in memory.

    Args:
        model: The run's settings.
        folder: The run, for its learned factors.

    Raises:
        ConfigurationError: If the run has not finished.
    """

    def __init__(self, model: OmniQuantModel, folder: RunFolder) -> None:
        folder.check_finished(len(model.source))
        self._model = model
        self._source = model.source
        self._folder = folder
        self.linears = {
            name.removesuffix(".weight"): LinearWeight(spec, (shape[0], shape[1]))
            for name, (spec, shape) in model.quantized_weights.items()
        }
        """Every quantized weight by its linear's name in the checkpoint."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._source)

    @property
    def non_block_names(self) -> tuple[str, ...]:
        """Names of the tensors outside the blocks, sorted."""
        return self._source.non_block_names

    def block_names(self, index: int) -> tuple[str, ...]:
        """Return the names of a block's tensors in the checkpoint, those of quantized weights among them."""
        return tuple(self._source.stored_names(index).values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the checkpoint, by its name there."""
        return self._source.describe(name).shape

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return what holds a tensor that is not quantized exactly: the source's dtype where folding left it alone."""
        if self._model.rotation is not None or name not in self.non_block_names:
            return torch.float32
        return _DTYPES.get(self._source.describe(name).dtype, torch.float32)

    def non_block_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors outside the blocks, in the order of :attr:`non_block_names`."""
        return self._source.non_block_tensors()

    def block(self, index: int) -> FoldedTensors:
        """Fold one block, as the run did.

        Raises:
            ConfigurationError: If its factors are missing or damaged.
        """
        return_free_memory()  # of the block before
        tensors = self._source.block_tensors(index)
        block = self._model.folded(index, tensors, BlockCall(), self._folder.load_factors(index))
        stored = self._source.stored_names(index)
        weights = {stored[f"{name}.weight"].removesuffix(".weight"): found for name, found in block.quantized.items()}
        others = {
            stored[name]: block.tensors[name] for name in stored if stored[name].removesuffix(".weight") not in weights
        }
        return FoldedTensors(others, weights)
