"""What a calibration leaves in memory, for tests that look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback
from omniquant_pl.model import OmniQuantModel


class KeepBlocks(CalibrationCallback):
    """Keeps the folded blocks as the calibration left them, and what was measured of them."""

    def __init__(self) -> None:
        self.blocks: list[QuantizedBlock] = []
        self.results: list[BlockResult] = []

    def on_block_end(self, trainer: Any, block: QuantizedBlock, result: BlockResult) -> None:
        self.blocks.append(block)
        self.results.append(result)

    @torch.no_grad()
    def logits(self, model: OmniQuantModel, tokens: Tensor) -> Tensor:
        """Runs the kept blocks between the model's embedding and head."""
        hidden = model.source.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return model.source.logits(hidden)
