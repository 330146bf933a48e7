"""What stands under ``quantization_config`` in a compressed-tensors checkpoint: which modules are quantized, and how.

Read in compressed-tensors 0.20 (``quantization/quant_args.py``, ``quant_config.py``, ``lifecycle/apply.py``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.export.structure import block_kinds, expert_linears, row_linears, unquantized_matrices
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec

__all__ = ["LinearKind", "attention_classes", "describe", "linear_kinds"]


class LinearKind(NamedTuple):
    """Linears that one entry of the configuration describes.

    Attributes:
        bits: Width of their weights.
        group_size: Input channels that share a scale; ``None`` for all.
        row_width: Their input channels, where they get rows; ``None`` where they get ``[batch, tokens, in]``.
    """

    bits: int
    group_size: int | None
    row_width: int | None


def linear_kinds(model: OmniQuantModel) -> dict[LinearKind, list[str]]:
    """Return the names of the quantized linears by what describes them, what most have in common first.

    In a model with experts it is what describes the experts: transformers takes that entry for them.
    """
    rows = row_linears(model.source) if model.scheme.activations is not None else set()
    kinds: dict[LinearKind, list[str]] = defaultdict(list)
    for weight, (spec, shape) in model.quantized_weights.items():
        name, columns = weight.removesuffix(".weight"), shape[1]
        grouped = spec.group_size is not None and spec.group_size <= columns
        gets_rows = any(name.endswith(f".{linear}") for linear in rows)
        kinds[LinearKind(spec.bits, spec.group_size if grouped else None, columns if gets_rows else None)].append(name)
    experts = expert_linears(model.source)
    order = sorted(kinds.items(), key=lambda item: (not experts.isdisjoint(item[1]), len(item[1])), reverse=True)
    return dict(order)


def attention_classes(source: SourceModel) -> dict[str, nn.Module]:
    """Return an attention module, without weights, of each class."""
    modules = [block.get_submodule(layout.attention) for _, layout, block in block_kinds(source)]
    return {type(module).__name__: module for module in modules}


def describe(model: OmniQuantModel, layout: str) -> dict[str, Any]:
    """Return the configuration.

    Args:
        model: The settings.
        layout: How the weights are stored: pack-quantized or int-quantized.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(_groups(model))},
        "ignore": _ignored(model.source),
    }


def _groups(model: OmniQuantModel) -> list[dict[str, Any]]:
    activations = model.scheme.activations
    kinds = linear_kinds(model)
    groups: list[dict[str, Any]] = []
    for index, (kind, names) in enumerate(kinds.items()):
        others = [name for other, found in kinds.items() if other != kind for name in found]
        group = {"targets": _targets(names, others) if index else ["Linear"], "weights": _weights(model, kind)}
        groups.append(group | ({} if activations is None else {"input_activations": _inputs(activations, kind)}))
    if activations is not None:
        # Of three axes, "token" keeps two: of [batch, heads, tokens, head_dim] it would take one range a head.
        inputs = _per_slice(activations, model.source.attention.head_dim)
        groups += [{"targets": [name], "input_activations": inputs} for name in attention_classes(model.source)]
    return groups


def _targets(names: list[str], others: list[str]) -> list[str]:
    """Return patterns that match these linears and not the others: their kind, the last part of a name, if it can."""
    kinds, other_kinds = ({name.rpartition(".")[2] for name in found} for found in (names, others))
    shared = kinds & other_kinds
    single = [name for name in names if name.rpartition(".")[2] in shared]
    return [*(rf"re:.*\.{kind}$" for kind in sorted(kinds - shared)), *(_pattern(name) for name in single)]


def _pattern(name: str) -> str:
    """Match a module whatever stands before its name, as checkpoints may lack the first part."""
    return rf"re:(.*\.)?{re.escape(name)}$"


def _weights(model: OmniQuantModel, kind: LinearKind) -> dict[str, Any]:
    return {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": model.scheme.weights.symmetric,
        "strategy": "channel" if kind.group_size is None else "group",
        "group_size": kind.group_size,
        "dynamic": False,
    }


def _inputs(activations: ActivationSpec, kind: LinearKind) -> dict[str, Any]:
    if kind.row_width is not None:  # of [tokens, in], "token" would take one range for all
        return _per_slice(activations, kind.row_width)
    return {**_activations(activations), "strategy": "token"}


def _per_slice(activations: ActivationSpec, width: int) -> dict[str, Any]:
    """Return what takes a range for each slice of the last axis, however many axes there are."""
    return {**_activations(activations), "strategy": "group", "group_size": width}


def _activations(activations: ActivationSpec) -> Mapping[str, Any]:
    return {"num_bits": activations.bits, "type": "int", "symmetric": activations.symmetric, "dynamic": True}


def _ignored(source: SourceModel) -> list[str]:
    """Return what ``Linear`` would match as well: the head, and all else that holds a matrix or that text skips."""
    unread = [name.rpartition(".")[2] for name in source.family.unread]
    around = [
        name.removesuffix(".weight")
        for name in source.non_block_names
        if name.endswith(".weight")
        and len(source.describe(name).shape) == 2
        and not any(part in unread for part in name.split("."))
    ]
    return [
        "lm_head",
        *(_pattern(name) for name in around if name != "lm_head"),
        *(rf"re:.*\.{re.escape(name)}$" for name in sorted(unquantized_matrices(source))),
        *(rf"re:.*{name}\..*" for name in unread),
    ]
