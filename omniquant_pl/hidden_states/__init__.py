"""The hidden states between blocks: on the device, the host or the disk, and the batches that blocks learn from."""

from omniquant_pl.hidden_states.batches import BatchOrder, HiddenStateBatches, map_hidden_states, read_ahead
from omniquant_pl.hidden_states.errors import mean_square, mean_squared_error
from omniquant_pl.hidden_states.persisted import PersistedHiddenStates
from omniquant_pl.hidden_states.states import HiddenStatePair, HiddenStates
from omniquant_pl.hidden_states.storage import (
    HIDDEN_STATES_PREFIX,
    MemoryBudget,
    Storage,
    StorageTier,
    storage_tier_for,
)

__all__ = [
    "HIDDEN_STATES_PREFIX",
    "BatchOrder",
    "HiddenStateBatches",
    "HiddenStatePair",
    "HiddenStates",
    "MemoryBudget",
    "PersistedHiddenStates",
    "Storage",
    "StorageTier",
    "map_hidden_states",
    "mean_square",
    "mean_squared_error",
    "read_ahead",
    "storage_tier_for",
]
