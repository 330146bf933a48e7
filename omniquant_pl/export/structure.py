"""What formats ask about a model's modules, answered without its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.families import BlockLayout
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.affine import group_size_of
from omniquant_pl.spec import WeightSpec

__all__ = [
    "block_kinds",
    "expert_linears",
    "first_refusal",
    "is_tied",
    "model_type",
    "ragged_refusal",
    "rewritten_linears",
    "row_linears",
    "unquantized_matrices",
]


def model_type(source: SourceModel) -> str:
    """Return the family, which that of the checkpoint is opened as if it is another."""
    return str(source.config_json["model_type"])


def is_tied(source: SourceModel) -> bool:
    """Return whether the head's weight is the embedding's."""
    return source.is_tied


def first_refusal(model: OmniQuantModel, refusal: Callable[[WeightSpec, tuple[int, ...]], str | None]) -> str | None:
    """Return the first linear that a format does not hold and why, ``None`` if it holds all.

    Args:
        model: The settings.
        refusal: Takes how a weight is quantized and its shape ``(out, in)``; says why it is not held.
    """
    for name, (spec, shape) in model.quantized_weights.items():
        reason = refusal(spec, shape)
        if reason is not None:
            return f"{name.removesuffix('.weight')}: {reason}"
    return None


def block_kinds(source: SourceModel) -> Iterator[tuple[int, BlockLayout, nn.Module]]:
    """Yield index, layout and modules, without storage, of one block of each layout."""
    seen: list[BlockLayout] = []
    for index, layout in enumerate(source.layouts):
        if layout not in seen:
            seen.append(layout)
            shapes = source.block_shapes(index)
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            yield index, layout, source.make_block(index, tensors)


def expert_linears(source: SourceModel) -> set[str]:
    """Return the linears of experts that transformers holds as 3-D weights, by their names in the checkpoint."""
    found: set[str] = set()
    for index, layout in enumerate(source.layouts):
        if layout.experts is not None:
            stored, module = source.stored_names(index), f"{layout.experts.module}."
            found |= {stored[f"{name}.weight"] for name in layout.linears if name.startswith(module)}
    return {name.removesuffix(".weight") for name in found}


def rewritten_linears(source: SourceModel) -> set[str]:
    """Return the classes of quantized linears that are no plain ``nn.Linear``, as Falcon's."""
    modules = (block.get_submodule(name) for _, layout, block in block_kinds(source) for name in layout.linears)
    return {type(module).__name__ for module in modules if type(module) is not nn.Linear}


def unquantized_matrices(source: SourceModel) -> set[str]:
    """Return the modules in blocks that hold a matrix which is not quantized, as routers.

    They are named as in the model and as in the checkpoint, from behind the block's own name.
    """
    names: set[str] = set()
    for index, layout in enumerate(source.layouts):
        shapes = source.block_shapes(index)
        for name, stored in source.stored_names(index).items():
            module = name.removesuffix(".weight")
            if len(shapes[name]) == 2 and module not in layout.linears:
                names |= {module, stored.removesuffix(".weight").partition(f".{index}.")[2]}
    return names


def ragged_refusal(spec: WeightSpec, shape: tuple[int, ...]) -> str | None:
    """Return that the last group of a weight ``(out, in)`` has fewer channels than the others, if it has."""
    columns = shape[1]
    group_size = group_size_of(spec, columns)
    return f"{columns} input channels are no multiple of the group size {group_size}" if columns % group_size else None


@torch.no_grad()
def row_linears(source: SourceModel) -> set[str]:
    """Return the linears of the first block that get rows ``[tokens, in]``, not ``[batch, tokens, in]``, as OPT's MLP.

    The block runs with weights that are all zero and take no memory.
    """
    found: set[str] = set()

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].ndim == 2:
                found.add(name)

        return hook

    zero = torch.zeros((), device=source.device)
    zeros = {name: zero.expand(shape) for name, shape in source.block_shapes(0).items()}
    block = source.make_block(0, zeros)
    for name in source.layouts[0].linears:
        block.get_submodule(name).register_forward_pre_hook(look(name))
    hidden = source.embed(torch.zeros(1, 2, dtype=torch.long))
    source.calls(hidden.shape[1])[0](block, hidden)
    return found
