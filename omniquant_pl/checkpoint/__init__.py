"""The source model, read block by block."""

from omniquant_pl.checkpoint.locate import embedded_models, from_any_folder, is_hub_id, locate_model
from omniquant_pl.checkpoint.reader import Checkpoint
from omniquant_pl.checkpoint.skeleton import BlockCall
from omniquant_pl.checkpoint.source import SourceModel

__all__ = [
    "BlockCall",
    "Checkpoint",
    "SourceModel",
    "embedded_models",
    "from_any_folder",
    "is_hub_id",
    "locate_model",
]
