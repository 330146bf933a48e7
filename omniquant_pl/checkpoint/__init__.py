"""Reading models block by block and writing files safely."""

from omniquant_pl.checkpoint.files import finite, replace_file, write_json, write_tensors, write_text
from omniquant_pl.checkpoint.locate import embedded_models, from_any_folder, is_hub_id, locate_model
from omniquant_pl.checkpoint.reader import Checkpoint
from omniquant_pl.checkpoint.sealed import DamagedFileError, read_sealed, write_sealed
from omniquant_pl.checkpoint.skeleton import BlockCall
from omniquant_pl.checkpoint.source import SourceModel

__all__ = [
    "BlockCall",
    "Checkpoint",
    "DamagedFileError",
    "SourceModel",
    "embedded_models",
    "finite",
    "from_any_folder",
    "is_hub_id",
    "locate_model",
    "read_sealed",
    "replace_file",
    "write_json",
    "write_sealed",
    "write_tensors",
    "write_text",
]
