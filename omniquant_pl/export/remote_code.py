"""Python code that comes with a checkpoint: exported where it was trusted, otherwise not named any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from omniquant_pl.model import OmniQuantModel
from omniquant_pl.utils.files import write_json

__all__ = ["config_for", "copy_code", "drops_code", "rewrite", "without_missing_code"]

_KEY = "auto_map"


def config_for(model: OmniQuantModel) -> dict[str, Any]:
    """Return the source's ``config.json`` for an exported folder, with ``auto_map`` only if its code comes along."""
    source = model.source
    return without_missing_code(source.config_json, source.folder, model.trust_remote_code)


def drops_code(model: OmniQuantModel) -> bool:
    """Return whether an export leaves out what the source's ``auto_map`` names."""
    return _KEY in model.source.config_json and config_for(model).get(_KEY) != model.source.config_json[_KEY]


def without_missing_code(config: Mapping[str, Any], folder: Path, trusts_code: bool) -> dict[str, Any]:
    """Return a configuration whose ``auto_map`` names only code that is trusted and there.

    Args:
        config: Content of a JSON file of the folder.
        folder: The original model's folder.
        trusts_code: Whether code that comes with it may run.
    """
    rest = {key: value for key, value in config.items() if key != _KEY}
    names = config.get(_KEY)
    if not trusts_code or not isinstance(names, Mapping):
        return rest
    kept = {kind: name for kind, name in names.items() if all(_is_there(each, folder) for each in _references(name))}
    return rest | {_KEY: kept} if kept else rest


def copy_code(source: Path, target: Path) -> None:
    """Copy the modules that the JSON files of an exported folder name, and those that they import from beside them."""
    for path in sorted(target.glob("*.json")):
        names = _read(path).get(_KEY)
        for name in names.values() if isinstance(names, Mapping) else ():
            for reference in _references(name):
                if "--" not in reference:
                    _copy_module(source / _file_of(reference), source, target)


def rewrite(path: Path, folder: Path, trusts_code: bool) -> None:
    """Leave out of a copied JSON file the code that does not come along."""
    content = _read(path)
    if _KEY in content:
        write_json(path, without_missing_code(content, folder, trusts_code))


def _copy_module(path: Path, source: Path, target: Path) -> None:
    for file in (path, *map(Path, get_relative_import_files(path))):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _references(name: Any) -> Iterator[str]:
    """Yield the classes under a key of ``auto_map``: one, or for tokenizers a slow and a fast one, or one of them."""
    for each in name if isinstance(name, list | tuple) else (name,):
        if isinstance(each, str):
            yield each


def _is_there(reference: str, folder: Path) -> bool:
    """Return whether a class is code of another repository of the hub, or of a file of the folder."""
    return "--" in reference or (folder / _file_of(reference)).is_file()


def _file_of(reference: str) -> str:
    return f"{reference.rpartition('.')[0].replace('.', '/')}.py"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
