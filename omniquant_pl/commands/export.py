"""The command ``export``: a finished run in another program's format."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import Tensor

from omniquant_pl.data import CalibrationData
from omniquant_pl.export import (
    FormatName,
    HubRepository,
    StorageDtype,
    Verification,
    check_agreement,
    check_target,
    open_format,
    verification_table,
)
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer.run_trainer import RunTrainer, bind

__all__ = ["export_run"]


def export_run(
    trainer: RunTrainer,
    model: OmniQuantModel,
    datamodule: CalibrationData,
    format: FormatName = "hf",  # noqa: A002 (the flag)
    output: str | None = None,
    dtype: StorageDtype | None = None,
    shard_bytes: int = 5_000_000_000,
    verify: bool = False,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write a finished run in a format that other programs load.

    Args:
        trainer: Whose run it is.
        model: The run's model settings.
        datamodule: What to verify with: the first evaluation set.
        format: Name of one of :data:`omniquant_pl.export.FORMATS`.
        output: The folder to create, or an earlier export to replace; null: named after the format, in the run folder.
        dtype: Storage of the tensors that are not quantized; null: what holds them exactly.
        shard_bytes: Largest size of one file.
        verify: Load the result with the programs it is meant for, those that are installed, and compare its logits
            with the calibrated model's.
        push: Upload the folder to this repository of the Hugging Face hub, owner/name; null: upload nothing.
        private: A repository that is created for it is seen by its owner alone.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If the run is not finished, the format cannot hold it exactly, a value is beyond the dtype
            that it would be stored in, the folder must not be replaced, or the hub refuses.
        CalibrationError: If a program computes other logits; the folder stays, and is not uploaded.
    """
    export = open_format(format, model, dtype, shard_bytes, section="")
    folder = trainer.run_folder.model if format == "hf" else trainer.run_folder.path / format
    folder = folder if output is None else Path(output)
    check_target(folder, trainer.run_folder.path, model.source.folder)
    export.check_values(model)
    verification = Verification(export, _first_window(datamodule, model)) if verify else None
    repository = None if push is None else HubRepository(push, private)
    export.write(model, trainer.run_folder, folder)
    Console().print(f"{format}: {folder}", soft_wrap=True)
    if verification is not None:
        results = verification.run(model, trainer.run_folder, folder)
        Console().print(verification_table(results))
        check_agreement(results)
    if repository is not None:
        Console().print(f"uploaded: {repository.upload(folder)}", soft_wrap=True)
    return folder


def _first_window(data: CalibrationData, model: OmniQuantModel) -> Tensor:
    """Token ids ``[1, tokens]`` of the first evaluation set."""
    bind(data, model)
    return next(iter(data.evaluation_tokens().values()))[:1]
