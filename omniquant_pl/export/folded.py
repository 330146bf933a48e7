"""A finished run as exports read it: one folded block at a time, under the names of published checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec
from omniquant_pl.utils.memory import return_free_memory

__all__ = ["FoldedModel", "FoldedTensors", "LinearWeight", "ModelTensors"]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by safetensors' names."""


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


class ModelTensors:
    """What is known of a model's tensors before it is calibrated: names, shapes, dtypes, and those that folding leaves.

    Args:
        model: The run's settings.

    Attributes:
        source: The original model.
    """

    def __init__(self, model: OmniQuantModel) -> None:
        self._model = model
        self.source = model.source
        self.linears = {
            name.removesuffix(".weight"): LinearWeight(spec, (shape[0], shape[1]))
            for name, (spec, shape) in model.quantized_weights.items()
        }
        """Every quantized weight by its linear's name in the checkpoint."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.source)

    @cached_property
    def non_block_names(self) -> tuple[str, ...]:
        """Names of the tensors outside the blocks, sorted."""
        return self.source.non_block_names

    def block_names(self, index: int) -> tuple[str, ...]:
        """Return the names of a block's tensors in the checkpoint, those of quantized weights among them."""
        return tuple(self.source.stored_names(index).values())

    def kept_names(self) -> Iterator[str]:
        """Yield the names of all tensors that are not quantized."""
        blocks = (name for index in range(len(self)) for name in self.block_names(index))
        for name in (*self.non_block_names, *blocks):
            if name.removesuffix(".weight") not in self.linears:
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the checkpoint, by its name there."""
        return self.source.describe(name).shape

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return what holds a tensor that is not quantized exactly: the source's dtype where folding left it alone."""
        if integer := self.integer_dtype(name):
            return integer
        if self._model.rotation is not None or name not in self.non_block_names:
            return torch.float32
        return _FLOATS.get(self.source.describe(name).dtype, torch.float32)

    def integer_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor of integers, such as position ids; ``None`` for floats."""
        return _INTEGERS.get(self.source.describe(name).dtype)

    def unfolded(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is not quantized and the same before the calibration as after it.

        These are the tensors outside the blocks, and, where nothing is folded into them, the others of the blocks.
        """
        yield from self.non_block_tensors()
        if self._model.transform is None and self._model.rotation is None:
            outside = set(self.non_block_names)
            for name in self.kept_names():
                if name not in outside:
                    yield name, self.source.checkpoint.read((name,))[name]

    def non_block_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors outside the blocks, in the order of :attr:`non_block_names`."""
        return self.source.non_block_tensors()


class FoldedModel(ModelTensors):
    """Reads a finished run; no more than one block is in memory.

    Args:
        model: The run's settings.
        folder: The run, for its learned factors.

    Raises:
        ConfigurationError: If the run has not finished.
    """

    def __init__(self, model: OmniQuantModel, folder: RunFolder) -> None:
        folder.check_finished(len(model.source))
        super().__init__(model)
        self._folder = folder

    def block(self, index: int) -> FoldedTensors:
        """Fold one block, as the run did.

        Raises:
            ConfigurationError: If its factors are missing or damaged.
        """
        return_free_memory()  # of the block before
        tensors = self.source.block_tensors(index)
        block = self._model.folded(index, tensors, BlockCall(), self._folder.load_factors(index))
        stored = self.source.stored_names(index)
        weights = {stored[f"{name}.weight"].removesuffix(".weight"): found for name, found in block.quantized.items()}
        others = {
            stored[name]: block.tensors[name] for name in stored if stored[name].removesuffix(".weight") not in weights
        }
        return FoldedTensors(others, weights)
