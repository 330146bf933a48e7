"""What a format is: it says which models it holds exactly, writes a folder, and knows the programs that load it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from omniquant_pl.export.folded import ModelTensors
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.narrowing import Narrowing
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
        section: What the settings' names begin with in errors: ``export.`` in a configuration, nothing where they are
            those of the command.
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

    def __init__(
        self, dtype: StorageDtype | None = None, shard_bytes: int = 5_000_000_000, section: str = "export."
    ) -> None:
        self.dtype = dtype
        self.shard_bytes = shard_bytes
        self.section = section

    @abstractmethod
    def refusal(self, model: OmniQuantModel) -> str | None:
        """Return why the format cannot hold a model exactly, ``None`` if it can; nothing but the header is read."""

    @abstractmethod
    def kept_dtypes(self, tensors: ModelTensors) -> Mapping[str, torch.dtype]:
        """Return what the tensors that are not quantized are stored in, those that the format has, by their names."""

    def check_values(self, model: OmniQuantModel) -> None:
        """Check that the format holds every value that the calibration does not change, before any work.

        Raises:
            ConfigurationError: It names the tensor, the value and a dtype that holds it.
        """
        tensors = ModelTensors(model)
        dtypes = self.kept_dtypes(tensors)
        for name, tensor in tensors.unfolded():
            if name in dtypes:
                self.kept(tensors, name, tensor, dtypes[name])

    def kept(self, tensors: ModelTensors, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor that is not quantized as it is stored.

        Raises:
            ConfigurationError: If the dtype, or the one that programs hold it in, does not hold a value.
        """
        held = self.held_in(tensors, name)
        if held is not None:
            held.cast(name, tensor)
        return self.keeping(dtype).cast(name, tensor)

    def held_in(self, tensors: ModelTensors, name: str) -> Narrowing | None:
        """Return the cast that programs do when they load a tensor, or dequantize a weight; ``None`` if they do none.

        Args:
            tensors: The model.
            name: Name of the tensor in the checkpoint, of a quantized weight as well.
        """
        return None

    def keeping(self, dtype: torch.dtype) -> Narrowing:
        """Return the cast of a tensor that is not quantized, to one of :meth:`kept_dtypes`."""
        return self.asked(dtype)

    def asked(self, dtype: torch.dtype) -> Narrowing:
        """Return a cast to a dtype that the setting ``dtype`` decides."""
        return Narrowing(dtype, f"{self.section}dtype")

    def fixed(self, dtype: torch.dtype) -> Narrowing:
        """Return a cast to a dtype that the format has no other for."""
        reason = f", and {self.name} has nothing wider"
        return Narrowing(dtype, f"{self.section}format", reason, "hf holds it in {}")

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
