"""Folds each block when it has learned, and keeps its factors."""

from __future__ import annotations

from typing_extensions import override

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import CalibrationTrainer, FoldingCallback

__all__ = ["FoldCallback"]


class FoldCallback(FoldingCallback):
    """Puts the final weights into a block and writes ``blocks/<index>.safetensors``."""

    @override
    def on_block_trained(self, trainer: CalibrationTrainer, block: QuantizedBlock) -> None:
        if block.is_folded:
            return
        block.fold()
        if trainer.is_global_zero:
            known = {"fingerprint": trainer.fingerprint, "loss_initial": block.loss_initial, "epochs": block.epochs}
            trainer.run_folder.save_factors(block.index, block.factors.export(), known)
