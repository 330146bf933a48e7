"""Where heads, and fused projections, lie in the weights of an attention module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["AttentionShape", "Part"]


@dataclass(frozen=True)
class AttentionShape:
    """Heads of an attention module.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads; ``heads`` is a multiple of it.
        head_dim: Channels of one head.
        rotary_dim: Leading channels of a head that the rotary embedding turns: channel ``i`` together with channel
            ``i + rotary_dim / 2``. ``None``: all of them; 0: no rotary embedding.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int | None = None

    def spread(self, per_kv_channel: Tensor) -> Tensor:
        """Repeat ``[kv_heads * head_dim]`` over the query heads that share them, to ``[heads * head_dim]``."""
        grouped = per_kv_channel.view(self.kv_heads, 1, self.head_dim)
        return grouped.expand(-1, self.heads // self.kv_heads, -1).reshape(-1)

    def gather(self, per_channel: Tensor) -> Tensor:
        """Take the largest over the query heads of a kv head: ``[heads * head_dim]`` to ``[kv_heads * head_dim]``."""
        return per_channel.view(self.kv_heads, -1, self.head_dim).amax(1).reshape(-1)

    @property
    def rotary_scales(self) -> int:
        """Scales that the channels of one head can have: one per rotary pair, one per channel that is not turned."""
        return self.head_dim - self._rotary_dim // 2

    def spread_rotary(self, per_pair: Tensor) -> Tensor:
        """Repeat ``[n * rotary_scales]`` over the two channels of each rotary pair, to ``[n * head_dim]``."""
        heads = per_pair.view(-1, self.rotary_scales)
        turned = heads[:, : self._rotary_dim // 2]
        return torch.cat((turned, turned, heads[:, self._rotary_dim // 2 :]), dim=1).reshape(-1)

    @property
    def _rotary_dim(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


@dataclass(frozen=True)
class Part:
    """Some output channels of a linear that computes several things at once.

    Attributes:
        linear: Dotted name of the fused linear.
        kind: Which of its outputs.
        order: How query, key and value lie in it. stacked: all queries, all keys, all values. grouped: one kv head
            after the other, each with its query heads, its key and its value.
    """

    linear: str
    kind: Literal["query", "key", "value", "gate", "up"]
    order: Literal["stacked", "grouped"] = "stacked"

    def __str__(self) -> str:
        """Return the name in files."""
        return f"{self.linear}.{self.kind}"

    def rows(self, shape: AttentionShape, out_features: int) -> Tensor:
        """Return the indices of its output channels, head after head.

        Args:
            shape: The heads, for query, key and value.
            out_features: Output channels of the whole linear.
        """
        every = torch.arange(out_features)
        if self.kind in ("gate", "up"):
            return every.view(2, -1)[("gate", "up").index(self.kind)]
        place = ("query", "key", "value").index(self.kind)
        groups = shape.kv_heads if self.order == "grouped" else 1
        sizes = [shape.heads * shape.head_dim // groups, *[shape.kv_heads * shape.head_dim // groups] * 2]
        rows: Tensor = every.view(groups, -1).split(sizes, dim=1)[place]
        return rows.reshape(-1)


def linear_and_rows(
    projection: str | Part, shape: AttentionShape, tensors: Mapping[str, Tensor]
) -> tuple[str, Tensor | None]:
    """Return the linear that a projection is, or is part of, and its output channels there (``None``: all)."""
    if isinstance(projection, Part):
        return projection.linear, projection.rows(shape, len(tensors[f"{projection.linear}.weight"]))
    return projection, None
