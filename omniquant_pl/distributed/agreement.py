"""What must be the same in all processes, compared."""

from __future__ import annotations

import platform
import socket
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from omniquant_pl.distributed.group import Group
from omniquant_pl.errors import CalibrationError, ConfigurationError

__all__ = ["check_agreement", "check_equal_blocks", "check_shared_folder"]

_PACKAGES = ("omniquant-pl", "torch", "lightning", "transformers", "safetensors", "numpy")
_KEYS = {"settings": "--config", "model": "model.path", "data": "data.dataset"}


def check_agreement(fingerprint: Mapping[str, str], group: Group) -> None:
    """Refuse processes that would calibrate something else than the first, or with other libraries.

    Args:
        fingerprint: What decides of a calibration, as digests.
        group: The processes.

    Raises:
        ConfigurationError: In all of them; it says which differs, where it runs, and in what.
    """
    own = {**fingerprint, "python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    found = group.collect((socket.gethostname(), own))
    with group.together():
        for rank, (host, other) in enumerate(found):
            for name, value in found[0][1].items():
                if other[name] == value:
                    continue
                where = f"process {rank} on {host}"
                if name in _KEYS:
                    message = f"{where} has another {name} than process 0 on {found[0][0]}; start all with the same"
                    raise ConfigurationError(_KEYS[name], message)
                message = f"{where} has {name} {other[name]}, process 0 on {found[0][0]} has {value}; install the same"
                raise ConfigurationError("trainer.num_nodes", message)


def check_shared_folder(path: Path, group: Group) -> None:
    """Refuse a run folder that is not the same one in all processes.

    Raises:
        ConfigurationError: In all of them.
    """
    if group.size == 1:
        return
    mark = path / ".job"
    name = group.collect(uuid.uuid4().hex)[0]
    if group.is_first:
        mark.write_text(name, encoding="utf-8")
    group.barrier()
    with group.together():
        if not (mark.is_file() and mark.read_text(encoding="utf-8") == name):
            message = (
                f"{path} on {socket.gethostname()} is not the folder of process 0; all nodes have to see the same one"
            )
            raise ConfigurationError("trainer.default_root_dir", message)
    if group.is_first:
        mark.unlink()


def check_equal_blocks(index: int, tensors: Iterable[Tensor], group: Group) -> None:
    """Refuse a block that the processes of a group have folded differently.

    Args:
        index: Position of the block.
        tensors: Its final tensors.
        group: The processes.

    Raises:
        CalibrationError: If they differ in a bit.
    """
    if group.size == 1:
        return
    sums = [int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors]
    if len(set(group.collect(tuple(sums)))) > 1:
        raise CalibrationError(
            f"block {index}: processes have folded it to different weights; nodes need the same kind of processor, and "
            "the same libraries"
        )
