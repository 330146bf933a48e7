"""Writes the calibrated model when every block is folded."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Trainer
from typing_extensions import override

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport
from omniquant_pl.hooks import CalibrationCallback
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer

__all__ = ["ExportCallback"]


class ExportCallback(CalibrationCallback):
    """Exports the calibrated model to ``model/`` in the run folder.

    Args:
        format: hf (a plain transformers folder with dequantized weights); null exports nothing.
        dtype: Storage of the weights: float32 keeps the calibrated values exactly, float16 and bfloat16 take half of
            it and round once more.
        shard_bytes: Largest size of one safetensors file.
    """

    def __init__(
        self,
        format: Literal["hf"] | None = "hf",  # noqa: A002 (the key in YAML)
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        shard_bytes: int = 5_000_000_000,
    ) -> None:
        if shard_bytes < 1:
            raise ConfigurationError("export.shard_bytes", f"{shard_bytes} is not a positive number of bytes")
        self.format = format
        self._export = HfExport(dtype, shard_bytes)

    @override
    def on_calibration_end(self, trainer: Trainer, model: OmniQuantModel) -> None:
        assert isinstance(trainer, SequentialTrainer)
        if self.format is not None and trainer.is_global_zero:
            self._export.write(model, trainer.run_folder, trainer.run_folder.model)
