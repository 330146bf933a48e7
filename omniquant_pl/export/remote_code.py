"""Python code that comes with a checkpoint: what of it an exported folder carries, and what its JSON says of it.

transformers finds such code by ``auto_map``: classes by their automatic class, ``module.Class`` for a file of the
folder, ``owner/name--module.Class`` for one of a repository on the hub. Read in transformers 5.22
(``dynamic_module_utils.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniquant_pl.utils.files import write_json

__all__ = ["RemoteCode"]

_KEY = "auto_map"


class RemoteCode:
    """The code of one checkpoint, copied where it was trusted and is all there, and no longer named where not.

    Args:
        source: The checkpoint's folder.
        is_trusted: Whether its code may run.
    """

    def __init__(self, source: Path, is_trusted: bool) -> None:
        self._source = source
        self._is_trusted = is_trusted
        self._files: set[str] = set()
        self._left: set[str] = set()

    def carried(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a JSON file says, without the code that the folder will not have.

        Args:
            content: A configuration of a model, tokenizer or processor; sections in it may name code as well.
        """
        result: dict[str, Any] = {}
        for key, value in content.items():
            if key == _KEY:
                kept = self._kept(value)
                result |= {key: kept} if kept else {}
            else:
                result[key] = self.carried(value) if isinstance(value, Mapping) else value
        return result

    def copy_json(self, path: Path, target: Path) -> None:
        """Copy a JSON configuration to a path, byte by byte if all code that it names comes along."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None  # whoever reads it says so
        carried = self.carried(content) if isinstance(content, dict) else content
        if carried != content:
            write_json(target, carried)
        else:
            shutil.copyfile(path, target)

    def copy_files(self, target: Path) -> None:
        """Copy the code that what has been carried names, and what that imports."""
        for name in sorted(self._files):
            shutil.copyfile(self._source / name, target / name)

    @property
    def note(self) -> str:
        """A sentence for the model card on code that was left out; empty if none was."""
        if not self._left:
            return ""
        reason = "not all of it was there" if self._is_trusted else "it was not trusted (`model.trust_remote_code`)"
        names = ", ".join(f"`{name}`" for name in sorted(self._left))
        return f"The original's own Python code for {names} is left out, and its `auto_map` with it: {reason}."

    def _kept(self, references: Any) -> Any:
        """Return what stays of an ``auto_map``; older tokenizers have a pair of references there and no class."""
        if not isinstance(references, Mapping):
            return self._kept({"AutoTokenizer": references}).get("AutoTokenizer")
        kept = {}
        for name, reference in references.items():
            found = reference if isinstance(reference, list | tuple) else [reference]
            if all(one is None or self._takes(one) for one in found):
                kept[name] = reference
            else:
                self._left.add(name)
        return kept

    def _takes(self, reference: Any) -> bool:
        if not self._is_trusted or not isinstance(reference, str):
            return False
        if "--" in reference:  # transformers fetches it, as for the original
            return True
        files = self._modules(reference.rpartition(".")[0])
        self._files |= files
        return bool(files)

    def _modules(self, module: str) -> set[str]:
        """Return the names of a module's file and of those it imports; none if one is missing or outside the folder."""
        from transformers.dynamic_module_utils import get_relative_import_files

        first = self._source / f"{module}.py"
        try:
            files = [first, *(Path(path) for path in get_relative_import_files(first))]
        except (OSError, UnicodeDecodeError):
            return set()
        is_whole = all(path.parent == self._source and path.is_file() for path in files)
        return {path.name for path in files} if is_whole else set()
