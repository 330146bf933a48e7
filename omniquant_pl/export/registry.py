"""The formats by name, and the refusal of what a format cannot hold."""

from __future__ import annotations

from typing import Literal

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export.compressed_tensors import CompressedTensorsExport
from omniquant_pl.export.factors import FactorsExport
from omniquant_pl.export.format import Export, StorageDtype
from omniquant_pl.export.gguf import GgufExport
from omniquant_pl.export.gptq import GptqExport
from omniquant_pl.export.hf import HfExport
from omniquant_pl.export.mlc import MlcExport
from omniquant_pl.export.packed import PackedExport
from omniquant_pl.model import OmniQuantModel

__all__ = ["FORMATS", "FormatName", "open_format"]

FormatName = Literal["hf", "packed", "gptq", "compressed-tensors", "gguf", "mlc", "factors"]

FORMATS: dict[str, type[Export]] = {
    export.name: export
    for export in (HfExport, PackedExport, GptqExport, CompressedTensorsExport, GgufExport, MlcExport, FactorsExport)
}
"""Every format by its name."""


def open_format(
    name: str, model: OmniQuantModel, dtype: StorageDtype | None = None, shard_bytes: int = 5_000_000_000
) -> Export:
    """Returns a format that can hold a model.

    Args:
        name: Its name.
        model: What it has to hold; its source is opened.
        dtype: Storage of the tensors that are not quantized; ``None`` for what holds them exactly.
        shard_bytes: Largest size of one file.

    Raises:
        ConfigurationError: If it cannot hold the model exactly; it names the formats that can. Or a value is out of
            range.
    """
    if shard_bytes < 1:
        raise ConfigurationError("export.shard_bytes", f"{shard_bytes} is not a positive number of bytes")
    export = FORMATS[name](dtype, shard_bytes)
    reason = export.refusal(model)
    if reason is None:
        return export
    able = [other for other, kind in FORMATS.items() if kind(dtype, shard_bytes).refusal(model) is None]
    message = f"{name} cannot hold this model exactly: {reason}; formats that can: {', '.join(able)}"
    raise ConfigurationError("export.format", message)
