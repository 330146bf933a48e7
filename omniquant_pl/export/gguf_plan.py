"""What a GGUF file will hold, before anything has been read: its tensors in order, their types and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.export.folded import LinearWeight, ModelTensors
from omniquant_pl.export.gguf_blocks import BLOCK_TYPES, BlockType, exact_type
from omniquant_pl.export.gguf_names import Architecture, Place
from omniquant_pl.export.structure import is_tied
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.spec import WeightSpec

__all__ = ["FileTensor", "GgufPlan", "linear_refusal", "places"]

_FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    Attributes:
        name: Its name there.
        parts: Names in the checkpoint of what it is made of: one matrix or vector, or one matrix for every expert.
        shape: Dimensions of one part; of the last its bytes.
        kind: How codes are packed, or the dtype of floats.
        spec: How the weights are quantized; ``None`` if they are not.
        rows: Order of the rows; ``None`` for the one they have.
        offset: What is added to values.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: BlockType | torch.dtype
    spec: WeightSpec | None = None
    rows: Tensor | None = None
    offset: float = 0.0

    @property
    def type(self) -> str:
        """Name of its type in ``GGMLQuantizationType``."""
        return self.kind.name if isinstance(self.kind, BlockType) else _FLOAT_TYPES[self.kind]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """All its dimensions; of the last its bytes."""
        return self.shape if len(self.parts) == 1 else (len(self.parts), *self.shape)

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.file_shape).numel()

    @property
    def weights(self) -> int:
        """How many quantized weights it holds."""
        per_byte = 1 / self.kind.itemsize if isinstance(self.kind, torch.dtype) else self.kind.weights / self.kind.bytes
        return 0 if self.spec is None else round(self.bytes * per_byte)

    def pack(self, parts: Sequence[Tensor | QuantizedWeight], narrowing: Narrowing) -> Tensor:
        """Return its bytes, uint8 :attr:`file_shape`.

        Args:
            parts: What it is made of.
            narrowing: The cast of scales, which must not round them, or of floats.

        Raises:
            ConfigurationError: If a value does not fit; it names the part.
        """
        named = zip(self.parts, parts, strict=True)
        return torch.stack([self._pack(name, part, narrowing) for name, part in named]).view(self.file_shape)

    def _pack(self, name: str, part: Tensor | QuantizedWeight, narrowing: Narrowing) -> Tensor:
        if isinstance(part, QuantizedWeight) and isinstance(self.kind, BlockType):
            assert self.spec is not None
            narrowing.cast(f"a scale of {name}", part.scale, is_exact=True)
            return self.kind.pack(self._ordered(part), self.spec)
        values = part.dequantize() if isinstance(part, QuantizedWeight) else part.float()
        values = values if self.rows is None else values[self.rows]
        return narrowing.cast(name, values + self.offset).contiguous().view(torch.uint8).view(self.shape)

    def _ordered(self, weight: QuantizedWeight) -> QuantizedWeight:
        if self.rows is None:
            return weight
        zero_point = None if weight.zero_point is None else weight.zero_point[self.rows]
        return QuantizedWeight(weight.codes[self.rows], weight.scale[self.rows], zero_point, weight.group_size)


def linear_refusal(spec: WeightSpec, shape: tuple[int, ...]) -> str | None:
    """Return why no type holds a quantized weight ``(out, in)`` without rounding, ``None`` if one does."""
    columns = shape[1]
    if spec.scale_dtype == "float32":
        return "llama.cpp's blocks have scales in float16; set model.weights.scale_dtype to it"
    if _is_too_wide(spec) or exact_type(spec, columns) is not None:
        return None
    group = "one group" if spec.group_size is None else f"groups of {spec.group_size}"
    return f"its rows, {group} of {columns} channels in all, do not go into llama.cpp's blocks of 32 or 256 weights"


def _is_too_wide(spec: WeightSpec) -> bool:
    """Return whether no block has as many values as ``code - zero_point``: 8 bit with zero points."""
    return exact_type(replace(spec, group_size=None), max(found.weights for found in BLOCK_TYPES)) is None


def places(source: SourceModel, architecture: Architecture, index: int | None) -> Iterator[tuple[str, Place | None]]:
    """Yield where the tensors of a block stand, or those around the blocks, by their names in the checkpoint.

    What nothing reads is left out: a head that is tied, an encoder of images.

    Args:
        source: The model.
        architecture: What llama.cpp knows it as.
        index: Position of the block; ``None`` for what is around the blocks.
    """
    if index is not None:
        experts = source.layouts[index].experts
        for name, stored in source.stored_names(index).items():
            yield stored, architecture.block_place(index, name, experts)
        return
    unread = {module.rpartition(".")[2] for module in source.family.unread}
    for name in source.non_block_names:
        place = architecture.non_block_place(name)
        is_repeated = place is not None and place.name == "output.weight" and is_tied(source)
        if not (is_repeated or architecture.is_unused(name) or unread & set(name.split("."))):
            yield name, place


class GgufPlan:
    """The tensors of a file.

    Args:
        source: The model.
        folded: Its tensors.
        architecture: What llama.cpp knows it as.
        dtype: Storage of matrices that no block holds; ``None`` for what holds them exactly.

    Attributes:
        non_block_tensors: Tensors around the blocks, by their names in the checkpoint.
        blocks: Those of every block.
    """

    def __init__(
        self, source: SourceModel, folded: ModelTensors, architecture: Architecture, dtype: torch.dtype | None
    ) -> None:
        self._source = source
        self._folded = folded
        self._architecture = architecture
        self._dtype = dtype
        self.non_block_tensors = {tensor.parts[0]: tensor for tensor in self._tensors(None)}
        self.blocks = [self._tensors(index) for index in range(len(folded))]

    @property
    def tensors(self) -> list[FileTensor]:
        """All of them, in order."""
        return [*self.non_block_tensors.values(), *(tensor for block in self.blocks for tensor in block)]

    def _tensors(self, index: int | None) -> list[FileTensor]:
        found: dict[str, dict[int, tuple[str, Place]]] = {}
        for name, place in places(self._source, self._architecture, index):
            assert place is not None
            found.setdefault(place.name, {})[place.expert or 0] = (name, place)
        return [self._tensor([parts[number] for number in sorted(parts)]) for parts in found.values()]

    def _tensor(self, parts: list[tuple[str, Place]]) -> FileTensor:
        stored, place = parts[0]
        names = tuple(name for name, _ in parts)
        shape = tuple(size for size in self._folded.shape(stored) if size > 1) or (1,)  # Qwen2-MoE's gate has one row
        rows = None if place.rows is None else place.rows(self._source.attention, shape[0])
        offset = self._architecture.offset(place.name)
        linear = self._folded.linears.get(stored.removesuffix(".weight"))
        if linear is not None:
            kind = self._kind_of_linear(linear)
            return FileTensor(place.name, names, _in_bytes(shape, kind), kind, linear.spec, rows, offset)
        dtype = self._dtype_of(stored, place.name, len(shape))
        return FileTensor(place.name, names, _in_bytes(shape, dtype), dtype, None, rows, offset)

    def _kind_of_linear(self, linear: LinearWeight) -> BlockType | torch.dtype:
        return exact_type(linear.spec, linear.shape[1]) or self._dtype or torch.float32

    def _dtype_of(self, stored: str, name: str, dimensions: int) -> torch.dtype:
        """llama.cpp computes with vectors and routers in float32 only."""
        if dimensions == 1 or "ffn_gate_inp" in name:
            return torch.float32
        return self._dtype or self._folded.exact_dtype(stored)


def _in_bytes(shape: tuple[int, ...], kind: BlockType | torch.dtype) -> tuple[int, ...]:
    if isinstance(kind, BlockType):
        return (*shape[:-1], shape[-1] // kind.weights * kind.bytes)
    return (*shape[:-1], shape[-1] * kind.itemsize)
