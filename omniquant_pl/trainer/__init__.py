"""The trainer that calibrates the blocks of a model in order, and the commands on a finished run."""

from omniquant_pl.trainer.sequential import SequentialTrainer

__all__ = ["SequentialTrainer"]
