"""Which files of a model folder hold its weights, and what a folder holds that is none of them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from omniquant_pl.checkpoint.pointers import check_not_pointer
from omniquant_pl.errors import ConfigurationError

__all__ = ["INDEX", "SINGLE", "shards_of", "weights_file"]

_log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r".+-(\d+)-of-(\d+)\.safetensors$")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weights_file(folder: Path, key: str, named: object = None) -> Path:
    """Return the safetensors file or the index of shards that transformers reads.

    One file goes before an index (``_get_resolved_checkpoint_files`` in transformers' ``modeling_utils.py``); what is
    then not read is logged.

    Args:
        folder: The model folder.
        key: The setting that led here.
        named: ``transformers_weights`` of the configuration, which goes before both.

    Raises:
        ConfigurationError: If there are no weights in safetensors; it says what there is instead.
    """
    if named is not None:
        return _named(folder, key, named)
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        if index.is_file():
            _log.warning("%s is read, as transformers does; %s and its shards are ignored", single, INDEX)
        return single
    if index.is_file():
        return index
    raise ConfigurationError(key, f"{folder} holds neither {SINGLE} nor {INDEX}; {_found_instead(folder)}")


def _named(folder: Path, key: str, named: object) -> Path:
    is_name = (
        isinstance(named, str)
        and Path(named).name == named
        and named.endswith((".safetensors", ".safetensors.index.json"))
    )
    if isinstance(named, str) and is_name and (folder / named).is_file():
        return folder / named
    message = f"transformers_weights is {named!r}, which is neither a safetensors file of the folder nor an index"
    raise ConfigurationError(key, f"{folder / 'config.json'}: {message}")


def shards_of(index: Path, key: str) -> Mapping[str, str]:
    """Return which file of the folder holds a tensor, by the tensor's name.

    Raises:
        ConfigurationError: If the file is no index, or a shard is missing.
    """
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        check_not_pointer(index, key)
        raise ConfigurationError(key, f"{index} is not an index of shards") from error
    strange = next((n for n in weight_map.values() if not isinstance(n, str) or Path(n).name != n), None)
    if strange is not None:
        raise ConfigurationError(key, f"{index} names {strange!r}, which is no file of the folder")
    missing = sorted({n for n in weight_map.values() if not (index.parent / n).is_file()})
    if missing:
        raise ConfigurationError(key, f"{index} names {missing[0]}, which is missing")
    return weight_map


def _found_instead(folder: Path) -> str:
    """Say what a folder without weights under transformers' names holds, and what to do with it."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        return _found_safetensors(found)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return f"it holds {pickled[0]}; pickled weights are not read: convert them with transformers' save_pretrained"
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return f"it holds {gguf[0]}, a file for llama.cpp; give the original checkpoint"
    return "it holds no weights; give a folder that transformers' save_pretrained has written"


def _found_safetensors(found: list[str]) -> str:
    first = found[0]
    shards = [match for match in map(_SHARD.match, found) if match is not None]
    if first.startswith("adapter_"):
        return (
            f"it holds {first}, an adapter; merge it into its model with peft's merge_and_unload and save that with "
            "save_pretrained"
        )
    if first.startswith("consolidated"):
        return (
            f"it holds {first}, safetensors under Mistral's own names for tensors; give the files under transformers' "
            "names, which the same repository may have, or convert it"
        )
    if shards:
        return (
            f"it holds {len(shards)} of {int(shards[0][2])} shards ({shards[0][0]}) without their index; fetch {INDEX} "
            "and all shards from where they come from"
        )
    return f"it holds {first}, safetensors under another name; if they are the model's weights, rename it to {SINGLE}"
