"""What a family's block looks like, as data: names of linears, norms, pairs; and the registry of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families.conversion import converted_families
from omniquant_pl.transform import AttentionShape, NormToLinears, Pair

__all__ = [
    "BlockLayout",
    "Experts",
    "Family",
    "PairLayout",
    "attention_shape",
    "family_of",
    "register",
    "registered_families",
    "unknown_family",
]


class PairLayout(Protocol):
    """Declaration of one pair; see :mod:`omniquant_pl.transform`."""

    @property
    def name(self) -> str:
        """The pair's name in files."""

    def build(self, tensors: Mapping[str, Tensor], shape: AttentionShape, shift: bool, /) -> Pair:
        """Return the learnable pair for a block with these weights and heads, with a shift where it can have one."""


@dataclass(frozen=True)
class Experts:
    """Experts that transformers holds as 3-D weights, ``gate_up_proj`` and ``down_proj``.

    For calibration each expert gets three linears, by the names that its weights have in checkpoints.

    Attributes:
        module: Dotted name of the module that holds them, relative to the block.
        gate: Name of an expert's gate projection.
        up: Name of its up projection.
        down: Name of its down projection.
    """

    module: str
    gate: str
    up: str
    down: str

    def projections(self, index: int) -> tuple[str, str, str]:
        """Return the dotted names of one expert's gate, up and down projection, relative to the block."""
        gate, up, down = (f"{self.module}.{index}.{kind}" for kind in (self.gate, self.up, self.down))
        return gate, up, down


@dataclass(frozen=True)
class BlockLayout:
    """Where things are in a block. All names are relative to it.

    Attributes:
        attention: The attention module.
        linears: The linears to quantize.
        pairs: Pairs of the learnable equivalent transformation as in the paper.
        mlp_pairs: Further pairs that ``model.transform.mlp`` adds.
        experts: Experts to take apart; ``linears`` names the parts.
        writers: Linears whose output is added to the residual stream, for families that name their ``head``.
    """

    attention: str
    linears: tuple[str, ...]
    pairs: tuple[PairLayout, ...]
    mlp_pairs: tuple[PairLayout, ...] = ()
    experts: Experts | None = None
    writers: tuple[str, ...] = ()


def attention_shape(config: PretrainedConfig) -> AttentionShape:
    """Read the heads from a model's configuration, under the names that most families use."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionShape(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)


@dataclass(frozen=True)
class Family:
    """What all models of one ``model_type`` have in common.

    Attributes:
        blocks: Dotted name of the list of blocks in the causal language model.
        block: Returns the layout of the block with an index, for a model's configuration (its part for text).
        shape: Reads the heads from a model's configuration (its part for text).
        refuse: Returns why a model of the family cannot be quantized, ``None`` if it can.
        stored: Parts of tensor names, and what stands in their place in checkpoints.
        unread: Modules that text does not reach, as a vision encoder. They are exported as they are stored.
        attention: Attention implementation that the model is built with; ``None`` for the one whose inputs are
            quantized. Another is for families that do not ask transformers' attention interface.
        returns_tuple: Whether the model takes the first of what a block returns.
        head: The final norm and the linear that computes the logits, by their names in the model, where the residual
            stream can be rotated: RMSNorms without biases are all that reads it, the blocks' ``NormToLinears`` pairs
            and this one, and the embedding and the blocks' ``writers`` are all that writes it.
    """

    blocks: str
    block: Callable[[Any, int], BlockLayout]
    shape: Callable[[Any], AttentionShape] = attention_shape
    refuse: Callable[[Any], str | None] = lambda config: None
    stored: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()
    attention: str | None = None
    returns_tuple: bool = False
    head: NormToLinears | None = None

    def stored_name(self, name: str) -> str:
        """Return the name that a tensor of the model has in checkpoints."""
        for own, other in self.stored:
            name = name.replace(own, other)
        return name


_FAMILIES: dict[str, Family] = {}


def register(model_type: str, family: Family, **changes: Any) -> None:
    """Make a family known.

    Args:
        model_type: ``model_type`` in the checkpoint's ``config.json``.
        family: Its description.
        changes: Fields in which it differs from ``family``.
    """
    _FAMILIES[model_type] = replace(family, **changes)


def registered_families() -> tuple[str, ...]:
    """Return every known ``model_type``, sorted, those that are opened as another's among them."""
    return tuple(sorted({*_FAMILIES, *converted_families()}))


def unknown_family(model_type: str) -> str | None:
    """Return that nobody registered a family, and which ones are known; ``None`` if it is one of them."""
    known = registered_families()
    return None if model_type in known else f"the family {model_type!r} is not supported; known: {', '.join(known)}"


def family_of(config: PretrainedConfig) -> Family:
    """Return the description of a model's family.

    Raises:
        ConfigurationError: If nobody registered the family, or this model of it cannot be quantized.
    """
    unknown = unknown_family(config.model_type)
    if unknown is not None:
        raise ConfigurationError("model.path", unknown)
    family = _FAMILIES[config.model_type]
    reason = family.refuse(config)
    if reason is not None:
        raise ConfigurationError("model.path", f"this {config.model_type} model is not supported: {reason}")
    return family
