"""Hidden states in front of segments, by one pass over the model that all processes share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omniquant_pl.calibration.engine import Engine
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.distributed import Group
from omniquant_pl.evaluate.perplexity import BlockBuilder
from omniquant_pl.hidden_states import HiddenStates, Storage, read_ahead
from omniquant_pl.utils.memory import return_free_memory

__all__ = ["segment_inputs"]

_SAMPLES_AT_ONCE = 8


@torch.no_grad()
def segment_inputs(
    source: SourceModel,
    build: BlockBuilder,
    tokens: Tensor,
    owners: Mapping[int, int],
    engine: Engine,
    group: Group,
) -> dict[int, HiddenStates]:
    """Compute the hidden states in front of some blocks.

    Every process runs its share of the samples through all blocks in front of the last border; then each border's
    hidden states are put together where they are needed. The next block is read while one is computed.

    Args:
        source: The model.
        build: Makes the blocks of the pass, the original ones or those that are folded.
        tokens: This process's share of the token ids ``[samples, tokens]``, of the same size in all processes.
        owners: By the index of a block, which process of the group needs what is in front of it.
        engine: Where to compute, and where streams are kept.
        group: The processes with the other samples of those that a segment has here.

    Returns:
        The streams that this process needs, by the index of the block.
    """
    found: dict[int, HiddenStates] = {}
    with source.on(engine.device):
        calls = source.calls(tokens.shape[1])
        with engine.context():
            hidden = engine.embed(source, tokens)
    last = max(owners)
    blocks = read_ahead(source.block_tensors(index) for index in range(last))
    for index in range(last + 1):
        if index in owners:
            stream = _put_together(hidden, owners[index], engine.storage, group)
            if stream is not None:
                found[index] = stream
        if index < last:
            block = build(index, next(blocks), calls[index]).to(engine.device)
            hidden = engine.map(block, hidden)
            del block
            return_free_memory()
    return found


def _put_together(hidden: HiddenStates, owner: int, storage: Storage, group: Group) -> HiddenStates | None:
    """Send the samples to one process: the first of each process first, then the second of each, and so on."""
    if group.size == 1:
        return hidden
    shape = (len(hidden) * group.size, *hidden.shape[1:])
    result = storage.empty(shape) if group.rank == owner else None
    for start in range(0, len(hidden), _SAMPLES_AT_ONCE):
        part = hidden.read(slice(start, start + _SAMPLES_AT_ONCE))
        received = group.gather(part, owner)
        if result is None or received is None:
            continue
        for rank, values in enumerate(received):
            result.write(slice(start * group.size + rank, (start + len(part)) * group.size, group.size), values)
    return result
