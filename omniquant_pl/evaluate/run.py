"""The perplexities of a run: full precision, round-to-nearest, calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.table import Table
from torch import Tensor

from omniquant_pl.distributed import Group
from omniquant_pl.evaluate.perplexity import BlockBuilder, original_blocks, perplexity
from omniquant_pl.hidden_states import MemoryBudget
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import VARIANTS, RunFolder

__all__ = ["VARIANTS", "Evaluation", "perplexity_table"]


class Evaluation:
    """Measures the variants of a model over the same tokens.

    Args:
        model: The settings.
        folder: Where the learned factors of the quantized variant are read from.
        tokens: Token ids ``[windows, length]`` by name of the evaluation set.
        room: Where to compute, and what hidden states may take.
        context: Precision context of the forward passes.
        group: Processes that share the windows.
    """

    def __init__(
        self,
        model: OmniQuantModel,
        folder: RunFolder,
        tokens: Mapping[str, Tensor],
        room: MemoryBudget,
        context: Callable[[], AbstractContextManager[Any]],
        group: Group | None = None,
    ) -> None:
        self._model = model
        self._folder = folder
        self._tokens = tokens
        self._room = room
        self._context = context
        self._group = group

    def measure(self, variant: str) -> dict[str, float]:
        """Return the perplexity of one of :data:`VARIANTS` by name of the evaluation set.

        Round-to-nearest is the baseline of everything: of the model as it is stored, also if it is to be rotated.

        Raises:
            ConfigurationError: If the quantized variant is asked for and its factors are not all there.
        """
        build = self._builder(variant)
        source = self._model.unrotated() if variant == "round_to_nearest" else self._model.source
        return {
            name: perplexity(source, build, windows, self._room, self._context, self._group)
            for name, windows in self._tokens.items()
        }

    def measure_all(self) -> dict[str, dict[str, float]]:
        """Return the perplexities by name of the evaluation set and variant.

        Raises:
            ConfigurationError: As :meth:`measure`, before anything else is measured.
        """
        found: dict[str, dict[str, float]] = {}
        for variant in reversed(VARIANTS):  # an unfinished run is refused at once
            for name, value in self.measure(variant).items():
                found.setdefault(name, {})[variant] = value
        return found

    def _builder(self, variant: str) -> BlockBuilder:
        model, folder = self._model, self._folder
        if variant == "full_precision":
            return original_blocks(model.source)
        if variant == "round_to_nearest":
            return model.round_to_nearest
        return lambda index, tensors, call: model.folded(index, tensors, call, folder.load_factors(index))


def perplexity_table(perplexities: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Return a table with one evaluation set a row and one variant a column."""
    table = Table("perplexity", *(variant.replace("_", " ") for variant in VARIANTS))
    for name, values in perplexities.items():
        table.add_row(name, *(_shown(values, variant) for variant in VARIANTS))
    return table


def _shown(values: Mapping[str, float | None], variant: str) -> str:
    if variant not in values:
        return ""
    value = values[variant]
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"
