"""What a family's block looks like, as data: names of linears, norms, pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.transform import AttentionShape, Pair

__all__ = [
    "BlockLayout",
    "PairLayout",
    "attention_shape",
    "layout_of",
    "register",
    "registered_families",
]


class PairLayout(Protocol):
    """Declaration of one pair; see :mod:`omniquant_pl.transform`."""

    @property
    def name(self) -> str:
        """The pair's name in files."""

    def build(self, tensors: Mapping[str, Tensor], shape: AttentionShape, /) -> Pair:
        """Returns the learnable pair for a block with these weights and heads."""


@dataclass(frozen=True)
class BlockLayout:
    """Where things are in the blocks of a family. All names are relative to a block, but for ``blocks``.

    Attributes:
        blocks: Dotted name of the list of blocks in the causal language model.
        attention: The attention module.
        linears: The linears to quantize.
        pairs: Pairs of the learnable equivalent transformation as in the paper.
        mlp_pairs: Further pairs that ``model.transform.mlp`` adds.
    """

    blocks: str
    attention: str
    linears: tuple[str, ...]
    pairs: tuple[PairLayout, ...]
    mlp_pairs: tuple[PairLayout, ...] = ()


_LAYOUTS: dict[str, BlockLayout] = {}


def register(model_type: str, layout: BlockLayout) -> None:
    """Makes a family known.

    Args:
        model_type: ``model_type`` in the checkpoint's ``config.json``.
        layout: Its blocks.
    """
    _LAYOUTS[model_type] = layout


def registered_families() -> tuple[str, ...]:
    """Returns every known ``model_type``, sorted."""
    return tuple(sorted(_LAYOUTS))


def layout_of(config: PretrainedConfig) -> BlockLayout:
    """Returns the layout of a model's family.

    Raises:
        ConfigurationError: If nobody registered the family.
    """
    if config.model_type not in _LAYOUTS:
        known = ", ".join(registered_families())
        raise ConfigurationError("model.path", f"the family {config.model_type!r} is not supported; known: {known}")
    return _LAYOUTS[config.model_type]


def attention_shape(config: PretrainedConfig) -> AttentionShape:
    """Reads the heads from a model's configuration."""
    heads = config.num_attention_heads
    return AttentionShape(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
