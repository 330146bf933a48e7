"""TVM's tensor cache: shards of raw tensors, and a list of what stands where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.utils.files import write_json

__all__ = ["write_tensor_cache"]

_LISTS = ("tensor-cache.json", "ndarray-cache.json")
"""The name of the list, and the one that it had until 2025."""
_DTYPES = {torch.int32: "uint32", torch.float16: "float16"}


def write_tensor_cache(folder: Path, tensors: Iterable[tuple[str, Tensor]], weights: int, limit: int) -> None:
    """Write tensors in order, without ever holding more than one shard.

    Read in python/tvm/contrib/tvmjs.py.

    Args:
        folder: Where to write.
        tensors: Names and tensors: float16, or int32 that stands for uint32.
        weights: How many weights they hold, for the mean of their bits.
        limit: Largest bytes of a shard; a single larger tensor gets one of its own.
    """
    shards: list[dict[str, Any]] = []
    pending: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        if pending and sum(held.nbytes for _, held in pending) + tensor.nbytes > limit:
            shards.append(_write_shard(folder, len(shards), pending))
            pending = []
        pending.append((name, tensor.contiguous()))
    shards.append(_write_shard(folder, len(shards), pending))
    size = sum(shard["nbytes"] for shard in shards)
    metadata = {
        "ParamSize": sum(len(shard["records"]) for shard in shards),
        "ParamBytes": float(size),
        "BitsPerParam": size * 8 / weights,
    }
    for file in _LISTS:
        write_json(folder / file, {"metadata": metadata, "records": shards})


def _write_shard(folder: Path, number: int, tensors: list[tuple[str, Tensor]]) -> dict[str, Any]:
    path = folder / f"params_shard_{number}.bin"
    checksum = hashlib.md5(usedforsecurity=False)
    records: list[dict[str, Any]] = []
    offset = 0
    with path.open("wb") as file:
        for name, tensor in tensors:
            data = tensor.numpy().tobytes()
            file.write(data)
            checksum.update(data)
            kind = {"dtype": _DTYPES[tensor.dtype], "format": "raw"}
            records.append(
                {"name": name, "shape": list(tensor.shape), **kind, "nbytes": len(data), "byteOffset": offset}
            )
            offset += len(data)
    return {
        "dataPath": path.name,
        "format": "raw-shard",
        "nbytes": offset,
        "records": records,
        "md5sum": checksum.hexdigest(),
    }
