"""The Lightning trainers that calibrate blocks in order or in parallel segments, and the checks of their settings."""

from omniquant_pl.trainer.sequential import SequentialTrainer

__all__ = ["SequentialTrainer"]
