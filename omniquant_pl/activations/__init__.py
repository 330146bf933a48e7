"""Hidden states between blocks: where they are kept, how they are read, the batches that blocks learn from."""

from omniquant_pl.activations.batches import BatchOrder, StreamBatches, map_stream, read_ahead
from omniquant_pl.activations.errors import mean_square, mean_squared_error
from omniquant_pl.activations.kept import KeptStreams
from omniquant_pl.activations.storage import STREAM_PREFIX, Place, Room, Storage, place_for
from omniquant_pl.activations.stream import Stream, Streams

__all__ = [
    "STREAM_PREFIX",
    "BatchOrder",
    "KeptStreams",
    "Place",
    "Room",
    "Storage",
    "Stream",
    "StreamBatches",
    "Streams",
    "map_stream",
    "mean_square",
    "mean_squared_error",
    "place_for",
    "read_ahead",
]
