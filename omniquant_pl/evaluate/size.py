"""What a model takes on disk, before and after."""

from __future__ import annotations

from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.storage import stored_bits

__all__ = ["model_sizes"]


def model_sizes(model: OmniQuantModel) -> dict[str, int]:
    """Return the bytes of the checkpoint as it is, and with its quantized weights packed."""
    source, weights = model.source, model.quantized_weights
    full = quantized = 0
    for name in {*source.checkpoint.names(), *source.non_block_names}:
        info = source.describe(name)
        size = info.elements * info.element_bytes
        full += size if name in source.checkpoint else 0  # a rotation gives a tied head a weight of its own
        quantized += -(-stored_bits(*weights[name]) // 8) if name in weights else size
    return {"full_precision": full, "quantized": quantized}
