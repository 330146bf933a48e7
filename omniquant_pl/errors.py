"""The errors that a person, not a programmer, can mend."""

from __future__ import annotations

__all__ = ["CalibrationError", "ConfigurationError"]


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
