"""GGUF files, which llama.cpp loads."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from omniquant_pl import __version__
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.export.card import model_card
from omniquant_pl.export.config import config_of
from omniquant_pl.export.folded import FoldedModel, ModelTensors
from omniquant_pl.export.folder import atomic_directory, copy_auxiliary_files
from omniquant_pl.export.format import Client, Export, Limits
from omniquant_pl.export.gguf_blocks import BlockType
from omniquant_pl.export.gguf_clients import llama_cpp_logits
from omniquant_pl.export.gguf_metadata import Value, hyperparameters, refusal, rotary_tensors
from omniquant_pl.export.gguf_names import ARCHITECTURES
from omniquant_pl.export.gguf_plan import FileTensor, GgufPlan, linear_refusal, places
from omniquant_pl.export.gguf_tokenizer import InexpressibleTokenizerError, Vocabulary, read_vocabulary
from omniquant_pl.export.remote_code import RemoteCode
from omniquant_pl.export.structure import first_refusal, is_tied, model_type
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import QuantizedWeight
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_json, write_text

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["GgufExport"]

_FILE = "model.gguf"
_FILE_TYPES = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
}
"""``LlamaFileType`` by the type of most weights, where it is not ``MOSTLY_`` and that."""


class GgufExport(Export):
    """Writes ``model.gguf``; codes, scales and zero points are put into blocks of llama.cpp's without rounding.

    Every linear gets the smallest type that holds it exactly. W8 with zero points, for which there is none, is stored
    dequantized, in float32 unless another dtype is asked for. Above ``shard_bytes`` the file is split as llama.cpp
    splits files, ``model-00001-of-0000N.gguf``; a program is given the first.
    """

    name = "gguf"
    description = "a file that llama.cpp loads"
    limits = Limits(
        weights="2 to 7 bit, and 8 bit symmetric, in groups of a multiple of 32, or none; 8 bit with zero points "
        "dequantized",
        activations="rounded by llama.cpp, its own way",
        loaded_by="[llama.cpp](deployment.md#llamacpp); transformers",
    )
    library = "gguf"
    clients = (Client("llama.cpp", ("llama_cpp",), llama_cpp_logits, tolerance=1e-1),)

    @override
    def refusal(self, model: OmniQuantModel) -> str | None:
        if importlib.util.find_spec("gguf") is None:
            return "the gguf package is missing: pip install 'omniquant-pl[gguf]'"
        source = model.source
        kind = model_type(source)
        if kind not in ARCHITECTURES:
            return f"llama.cpp does not know {kind} as this writes it; known: {', '.join(sorted(ARCHITECTURES))}"
        return (
            refusal(kind, source.config)
            or _check_tensors(source, kind)
            or first_refusal(model, linear_refusal)
            or _check_tokenizer(source)
        )

    @override
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        folded = FoldedModel(model, run)
        plan = self._plan(folded)
        with atomic_directory(output, run.path, model.source.folder) as target:
            self._write_file(model, folded, plan, target)
            code = RemoteCode(model.source.folder, model.trust_remote_code)
            write_json(target / "config.json", code.carried(config_of(model.source.config_json)))
            copy_auxiliary_files(model.source.folder, target, code)
            card = model_card(model, run, _storage(plan), library=self.library, code_note=code.note)
            write_text(target / "README.md", card)

    @override
    def kept_dtypes(self, tensors: ModelTensors) -> Mapping[str, torch.dtype]:
        return {
            part: tensor.kind
            for tensor in self._plan(tensors).tensors
            if isinstance(tensor.kind, torch.dtype) and tensor.spec is None
            for part in tensor.parts
        }

    def _plan(self, tensors: ModelTensors) -> GgufPlan:
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return GgufPlan(tensors.source, tensors, ARCHITECTURES[model_type(tensors.source)], dtype)

    def _write_file(self, model: OmniQuantModel, folded: FoldedModel, plan: GgufPlan, target: Path) -> None:
        from gguf import GGUFWriter

        source, tensors = model.source, plan.tensors
        kind = model_type(source)
        size = sum(tensor.bytes for tensor in tensors)
        limit = self.shard_bytes if size > self.shard_bytes else 0
        writer = GGUFWriter(target / _FILE, ARCHITECTURES[kind].name, split_max_size=limit)
        try:
            _add_values(writer, _general(model, tensors) | _scheme(model))
            _add_values(writer, hyperparameters(kind, source.config, source.attention), ARCHITECTURES[kind].name)
            _add_vocabulary(writer, read_vocabulary(source.tokenizer, source.config.vocab_size))
            rotary = rotary_tensors(source.config, source.attention)
            _add_infos(writer, rotary, tensors)
            for tensor in chain(rotary.values(), self._contents(folded, plan)):
                writer.write_tensor_data(tensor.numpy())
        finally:
            writer.close()

    def _contents(self, folded: FoldedModel, plan: GgufPlan) -> Iterator[Tensor]:
        """Yield the bytes of the tensors in order, with one block in memory at a time."""
        for name, tensor in folded.non_block_tensors():
            if name in plan.non_block_tensors:
                yield self._pack(plan.non_block_tensors[name], [tensor])
        for index, tensors in enumerate(plan.blocks):
            block = folded.block(index)
            parts: dict[str, Any] = {**block.tensors, **{f"{name}.weight": w for name, w in block.weights.items()}}
            for found in tensors:
                yield self._pack(found, [parts[name] for name in found.parts])
            del block, parts

    def _pack(self, tensor: FileTensor, parts: Sequence[Tensor | QuantizedWeight]) -> Tensor:
        """Return a tensor's bytes, whose floats and scales are in range."""
        if isinstance(tensor.kind, BlockType):
            return tensor.pack(parts, self.fixed(torch.float16))
        return tensor.pack(parts, self.asked(tensor.kind))


def _check_tensors(source: SourceModel, kind: str) -> str | None:
    """Return which tensor llama.cpp has no place for."""
    architecture = ARCHITECTURES[kind]
    for index in (None, *range(len(source))):
        for name, place in places(source, architecture, index):
            if place is None:
                return f"llama.cpp has no place for {name} in this family"
    if is_tied(source) and architecture.must_untie:
        return "llama.cpp wants a head of its own in this family, here it is the embedding"
    if not is_tied(source) and not architecture.can_untie:
        return "llama.cpp has the embedding as the head in this family, here it is another weight"
    return None


def _check_tokenizer(source: SourceModel) -> str | None:
    if source.found_tokenizer.complaint is not None:
        return source.found_tokenizer.complaint
    try:
        read_vocabulary(source.tokenizer, source.config.vocab_size)
    except InexpressibleTokenizerError as error:
        return f"llama.cpp has nothing like the tokenizer: {error}"
    return None


def _general(model: OmniQuantModel, tensors: Iterable[FileTensor]) -> dict[str, Value]:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.type] += tensor.weights
    most = counts.most_common(1)[0][0]
    return {
        "general.type": "model",
        "general.name": f"{Path(model.path).name} {model.scheme.name}",
        "general.quantized_by": f"omniquant-pl {__version__}",
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": int(LlamaFileType[_FILE_TYPES.get(most, f"MOSTLY_{most}")]),
    }


def _scheme(model: OmniQuantModel) -> dict[str, Value]:
    """Return how the weights are quantized; llama.cpp itself does not read it."""
    weights, activations = model.scheme.weights, model.scheme.activations
    values: dict[str, Value] = {
        "omniquant.scheme": model.scheme.name,
        "omniquant.weights.bits": weights.bits,
        "omniquant.weights.symmetric": weights.symmetric,
    }
    if weights.group_size is not None:
        values["omniquant.weights.group_size"] = weights.group_size
    return values if activations is None else values | {"omniquant.activations.bits": activations.bits}


def _add_values(writer: GGUFWriter, values: Mapping[str, Value], prefix: str | None = None) -> None:
    from gguf import GGUFValueType

    types = {
        str: GGUFValueType.STRING,
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
    }
    for key, value in values.items():
        writer.add_key_value(key if prefix is None else f"{prefix}.{key}", value, types[type(value)])


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    _add_values(writer, vocabulary.values)
    for key, values in vocabulary.arrays.items():
        writer.add_array(key, values)


def _add_infos(writer: GGUFWriter, rotary: Mapping[str, Tensor], tensors: Iterable[FileTensor]) -> None:
    """Write everything that stands before the tensors' data."""
    from gguf import GGMLQuantizationType

    for name, tensor in rotary.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
    for found in tensors:
        kind = GGMLQuantizationType[found.type]
        writer.add_tensor_info(found.name, found.file_shape, np.dtype(np.uint8), found.bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _storage(plan: GgufPlan) -> str:
    """Say in which types the weights are, and what they take."""
    quantized = [tensor for tensor in plan.tensors if tensor.spec is not None]
    count = sum(tensor.weights for tensor in quantized)
    bits = {tensor.type: tensor.bytes * 8 / tensor.weights for tensor in quantized}
    types = ", ".join(f"{name} ({size:g} bits a weight)" for name, size in sorted(bits.items()))
    mean = sum(tensor.bytes for tensor in quantized) * 8 / count
    floats = ", ".join(sorted({tensor.type for tensor in plan.tensors if tensor.spec is None}))
    return (
        f"`{_FILE}` is for llama.cpp. Quantized weights are stored as {types}, {mean:.2f} bits a weight in all, which "
        f"hold codes, scales and zero points without rounding; everything else is {floats}. llama.cpp itself rounds "
        "what it multiplies quantized weights with to 8 bit."
    )
