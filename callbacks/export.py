"""Writes the calibrated model when every block is folded."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from omniquant_pl.calibration.hooks import CalibrationCallback, CalibrationTrainer
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import Export, FormatName, HfExport, StorageDtype, check_target, open_format
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.narrowing import NarrowDtypeError

__all__ = ["ExportCallback"]


class ExportCallback(CalibrationCallback):
    """Exports the calibrated model to ``model/`` in the run folder.

    Args:
        format: Name of one of :data:`omniquant_pl.export.FORMATS`; null exports nothing.
        dtype: Storage of the tensors that are not quantized, with hf of all: float32 keeps the calibrated values
            exactly, float16 and bfloat16 take half of it and round once more; null: what holds them exactly.
        shard_bytes: Largest size of one file.
    """

    def __init__(
        self,
        format: FormatName | None = "hf",  # noqa: A002 (the key in YAML)
        dtype: StorageDtype | None = None,
        shard_bytes: int = 5_000_000_000,
    ) -> None:
        self.format = format
        self._dtype = dtype
        self._shard_bytes = shard_bytes

    def _open(self, model: OmniQuantModel) -> Export | None:
        return None if self.format is None else open_format(self.format, model, self._dtype, self._shard_bytes)

    @override
    def on_ready(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        export = self._open(model)
        if export is not None:
            export.check_values(model)
            run = trainer.run_folder
            key = "trainer.default_root_dir"
            check_target(run.model, run.path, model.source.folder, key, is_replaced=trainer.resumes)

    @override
    def on_calibration_end(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        export = self._open(model)
        if export is not None and trainer.is_global_zero:
            try:
                export.write(model, trainer.run_folder, trainer.run_folder.model)
            except NarrowDtypeError as error:
                raise _with_command(error, trainer.run_folder.config, export) from error


def _with_command(error: NarrowDtypeError, config: Path, export: Export) -> ConfigurationError:
    """Add what to do: the calibration has finished, and has to be exported in another dtype.

    Another format is the exact one, in float32: bfloat16 would round what it dequantizes.
    """
    is_asked = error.key == f"{export.section}dtype"
    target, dtype = (export.name, error.holding) if is_asked else (HfExport.name, "float32")
    command = f"python train.py export --config {config} --format {target} --dtype {dtype}"
    return ConfigurationError(error.key, f"{error.reason}; the calibration is kept, export it with {command}")
