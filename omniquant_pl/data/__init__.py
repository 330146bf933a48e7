"""Calibration and evaluation data: text, its windows of token ids, the Lightning data module."""

from omniquant_pl.data.builtin import builtin_text
from omniquant_pl.data.module import CalibrationData, TextSettings

__all__ = ["CalibrationData", "TextSettings", "builtin_text"]
