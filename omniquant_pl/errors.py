"""The errors that a person, not a programmer, can mend, and how others keep their words."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

__all__ = ["CalibrationError", "ConfigurationError", "one_line", "unmasked"]

_Owner = TypeVar("_Owner")
_Value = TypeVar("_Value")


class ConfigurationError(ValueError):
    """A setting or an input file that cannot work, found before any work is done.

    Args:
        key: The setting as it is written in YAML, for example ``model.weights.bits``.
        message: What is wrong with the value, and what would be accepted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.reason = message


class CalibrationError(RuntimeError):
    """A calibration that cannot go on; what was finished before is kept."""


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, behind its type where the message alone says too little."""
    message = " ".join(str(error).split())
    says_enough = isinstance(error, OSError | ValueError) and bool(message)
    return message if says_enough else f"{type(error).__name__}: {message}".removesuffix(": ")


def unmasked(read: Callable[[_Owner], _Value]) -> Callable[[_Owner], _Value]:
    """Decorate the function of a property of an ``nn.Module``, so that an AttributeError inside it stays visible.

    Python takes it for a missing attribute and asks ``nn.Module.__getattr__``, which then reports that the module has
    no attribute of the property's own name.

    Returns:
        The function, which raises a RuntimeError from any AttributeError.
    """

    @wraps(read)
    def reading(owner: _Owner) -> _Value:
        try:
            return read(owner)
        except AttributeError as error:
            raise RuntimeError(f"{type(owner).__name__}.{read.__name__}: {error}") from error

    return reading
