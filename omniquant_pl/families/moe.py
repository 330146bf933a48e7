"""What blocks with a mixture of experts have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from omniquant_pl.families.conversion import Shapes, StoredPart
from omniquant_pl.families.layout import BlockLayout, Experts
from omniquant_pl.transform import NormToLinears, UpToDown

__all__ = ["mixture_block", "routing_refusal", "unfused_experts"]

Projections = tuple[str, str, str]
"""Dotted names of a gate, an up and a down projection."""


def mixture_block(
    dense: BlockLayout,
    norm: str,
    experts: Experts,
    count: int,
    routers: tuple[str, ...],
    shared: tuple[Projections, ...] = (),
) -> BlockLayout:
    """Return the layout of a block with a mixture of experts, from that of the same block with a dense MLP.

    Routers stay in full precision. They read the norm as the experts do, so that its scale is taken back in their
    columns and every token goes to the experts that it went to before.

    Args:
        dense: Layout of the block with a dense MLP in the place of the mixture.
        norm: The norm in front of the MLP.
        experts: Where the experts are, and the names of their projections.
        count: Number of experts.
        routers: What else reads the norm.
        shared: Projections of experts that every token reaches.
    """
    mlp = experts.module.partition(".")[0] + "."
    projections = [experts.projections(index) for index in range(count)] + list(shared)
    readers = tuple(name for gate, up, _ in projections for name in (gate, up))
    return replace(
        dense,
        linears=(
            *(name for name in dense.linears if not name.startswith(mlp)),
            *(name for names in projections for name in names),
        ),
        pairs=(*(pair for pair in dense.pairs if pair.name != norm), NormToLinears(norm, readers, routers)),
        mlp_pairs=tuple(UpToDown(up, down) for _, up, down in projections),
        experts=experts,
        writers=(
            *(name for name in dense.writers if not name.startswith(mlp)),
            *(down for _, _, down in projections),
        ),
    )


def routing_refusal(config: Any, count: int) -> str | None:
    """Return why a router cannot choose as many experts as it should, ``None`` if it can."""
    chosen = config.num_experts_per_tok
    return None if 1 <= chosen <= count else f"num_experts_per_tok is {chosen}, of {count} experts"


def unfused_experts(shapes: Shapes, experts: Experts, stored_name: Callable[[str], str]) -> dict[str, StoredPart]:
    """Find the experts of a checkpoint that stores them as transformers holds them, in 3-D tensors.

    ``gate_up_proj`` is ``[experts, 2 * intermediate, hidden]``, the gates first; ``down_proj`` is ``[experts, hidden,
    intermediate]``. Published checkpoints, and what ``save_pretrained`` writes by default, have single experts.

    Args:
        shapes: What is stored.
        experts: Where the experts are, and the names of their projections.
        stored_name: Gives the names of published checkpoints for those of the model.

    Returns:
        Where the tensors of published checkpoints are, by name; nothing if no experts are stored as 3-D tensors.
    """
    gates_ups, downs = (f".{experts.module}.{kind}" for kind in ("gate_up_proj", "down_proj"))
    if not any(name.endswith(gates_ups) for name in shapes):
        return {}
    parts: dict[str, StoredPart] = {}
    for name, shape in shapes.items():
        if not name.endswith((gates_ups, downs)):
            parts[stored_name(name)] = StoredPart(name)
            continue
        block = name.removesuffix(gates_ups).removesuffix(downs)
        for index in range(shape[0]):
            gate, up, down = (stored_name(f"{block}.{linear}.weight") for linear in experts.projections(index))
            if name.endswith(downs):
                parts[down] = StoredPart(name, (index,))
            else:
                half = shape[1] // 2
                parts |= {
                    gate: StoredPart(name, (index, slice(half))),
                    up: StoredPart(name, (index, slice(half, None))),
                }
    return parts
