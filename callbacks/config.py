"""Keeps the resolved configuration in the run folder."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from omniquant_pl.calibration.hooks import CalibrationCallback, CalibrationTrainer
from omniquant_pl.checkpoint import from_any_folder
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.utils.files import write_text

__all__ = ["SaveConfig"]


class SaveConfig(SaveConfigCallback, CalibrationCallback):
    """Writes ``config.yaml`` into the run folder before any block is touched, when a run starts anew."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: Lightning calls this once a block."""

    @override
    def on_calibration_start(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        path = trainer.run_folder.config
        if trainer.is_global_zero and not (trainer.resumes and path.is_file() and not trainer.forces_resume):
            config = self.config.clone()
            config["ckpt_path"] = None  # who takes this file does not mean to go on
            config["model"]["path"] = from_any_folder(config["model"]["path"])
            write_text(path, self.parser.dump(config, skip_none=False))
