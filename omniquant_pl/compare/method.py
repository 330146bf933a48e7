"""What a comparison asks of a method, and what a method gets to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from omniquant_pl.compare.row import Row
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.utils.files import write_tensors

__all__ = ["Method", "MethodInputs"]


@dataclass(frozen=True)
class MethodInputs:
    """What is the same for all methods."""

    config: Mapping[str, Any]
    """The comparison's resolved configuration."""
    model: OmniQuantModel
    """The model, opened, and the scheme."""
    calibration: Tensor
    """Token ids ``[samples, tokens]``."""
    evaluation: Mapping[str, Tensor]
    """Token ids ``[windows, length]`` by name of the evaluation set."""
    device: str
    """Where to compute, such as ``cpu`` or ``cuda:0``."""

    def write_evaluation(self, folder: Path) -> Path:
        """Write the evaluation sets into a folder, for another process, and return the file."""
        path = folder / "evaluation.safetensors"
        write_tensors(path, self.evaluation)
        return path


class Method(ABC):
    """A method that takes part.

    Attributes:
        name: Its name in ``methods``.
        title: What people call it.
        note: In what its figures differ from those of other rows.
    """

    name: str
    title: str
    note: str = ""

    @abstractmethod
    def refusal(self, bench: MethodInputs) -> str | None:
        """Return why the method cannot do this, ``None`` if it can; nothing is run."""

    @abstractmethod
    def decides(self, bench: MethodInputs) -> Mapping[str, Any]:
        """Return what decides its figures, apart from the model's files and the tokens."""

    @abstractmethod
    def measure(self, bench: MethodInputs, folder: Path) -> Row:
        """Quantize and measures.

        Args:
            bench: What to quantize.
            folder: For everything that the method writes; what an interrupted attempt has left is there.

        Raises:
            CalibrationError: If the method fails; the message is one line.
        """
