"""What a format is: it says which models it holds exactly, writes a folder, and knows the programs that load it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder

__all__ = ["Client", "Export", "Limits", "StorageDtype"]

StorageDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Client:
    """A program that loads a format.

    Attributes:
        name: What people call it.
        packages: Modules that have to be installed for it.
        logits: Loads a folder and returns the logits ``[batch, tokens, vocabulary]`` for token ids ``[batch, tokens]``,
            in what it computes in: float32, or float64 where it quantizes activations with another order of
            operations, which in float32 rounds some of them to the code beside.
        tolerance: Largest relative error of the logits against the calibrated model's.
        quantizes_activations: Whether it quantizes activations as the scheme says.
    """

    name: str
    packages: tuple[str, ...]
    logits: Callable[[Path, Tensor], Tensor]
    tolerance: float = 1e-4
    quantizes_activations: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether all that it needs is there."""
        return all(importlib.util.find_spec(package) is not None for package in self.packages)


@dataclass(frozen=True)
class Limits:
    """What a format holds and who loads it, as Markdown for ``docs/exports.md``.

    Attributes:
        weights: Which weights it holds.
        activations: What becomes of quantized activations.
        loaded_by: The programs that load it.
    """

    weights: str
    activations: str
    loaded_by: str


class Export(ABC):
    """A format: a way of storing a calibrated model.

    Args:
        dtype: Storage of the tensors that are not quantized; ``None`` for what holds them exactly.
        shard_bytes: Largest size of one file.
    """

    name: ClassVar[str]
    """The name in ``export.format``."""

    description: ClassVar[str]
    """What it is, in a few words for ``--help``."""

    limits: ClassVar[Limits]
    """What it holds, for the table of formats."""

    library: ClassVar[str] = "transformers"
    """What loads it, in the words of the hub's model cards."""

    clients: ClassVar[tuple[Client, ...]]
    """The programs that load it, and that an export is verified with."""

    def __init__(self, dtype: StorageDtype | None = None, shard_bytes: int = 5_000_000_000) -> None:
        self.dtype = dtype
        self.shard_bytes = shard_bytes

    @abstractmethod
    def refusal(self, model: OmniQuantModel) -> str | None:
        """Return why the format cannot hold a model exactly, ``None`` if it can; nothing but the header is read."""

    def check_values(self, model: OmniQuantModel) -> None:  # noqa: B027 (most formats hold all values)
        """Refuse values outside the blocks that the format does not hold; no calibration changes them.

        Raises:
            ConfigurationError: It names the tensor.
        """

    @abstractmethod
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        """Export a finished run, one block in memory at a time.

        Args:
            model: The run's settings.
            run: The run, for its learned factors and metrics.
            output: The folder to create, or an earlier export to replace; it appears whole or not at all.

        Raises:
            ConfigurationError: If the run is not finished or is damaged, or the folder must not be replaced.
        """
