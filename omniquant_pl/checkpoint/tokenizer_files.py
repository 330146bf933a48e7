"""What can be seen in the files of a tokenizer that does not open."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from omniquant_pl.checkpoint.hub_files import TOKENIZER_FILES
from omniquant_pl.checkpoint.pointers import POINTER, is_pointer
from omniquant_pl.errors import one_line

__all__ = ["TokenizerFiles"]

_CONFIG, _SERIALIZED = "tokenizer_config.json", "tokenizer.json"
_SETTINGS = (_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
"""Files that transformers reads beside the vocabulary, and that are no tokenizer by themselves."""


_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""How a file of tiktoken's begins: a token in base64, and its rank."""


class TokenizerFiles:
    """The files of a model folder that transformers makes a tokenizer of.

    Args:
        folder: The model folder.

    Attributes:
        vocabularies: Those that hold tokens, any of which may do.
        is_code: Whether the tokenizer is code that comes with the model.
    """

    def __init__(self, folder: Path) -> None:
        found = (path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern)) if path.is_file())
        self._files = list(dict.fromkeys(found))
        self.vocabularies = [path for path in self._files if path.name not in _SETTINGS and path.suffix != ".jinja"]
        self.is_code = _has_code(folder / _CONFIG)

    @property
    def problem(self) -> str | None:
        """Why there is no sense in opening it: a pointer in the place of a file, or a package that is missing."""
        pointer = next(filter(is_pointer, self._read_files()), None)
        if pointer is not None:  # as text, a template or a list of merges would pass
            return f"{pointer.name} {POINTER}"
        return None if self.is_code else self._missing_packages()

    def cause(self, error: BaseException) -> str:
        """Say why it did not open, and what helps: what is seen in the files comes before what transformers says."""
        found = next(filter(None, map(_json_error, self._read_files())), None) or self._missing_packages()
        binary = self._binary()
        if found is None and binary is not None and not self.is_code and not _is_tiktoken(binary):
            found = f"{binary.name} is no SentencePiece model; is the download complete? Fetch it again"
        return found or f"{type(error).__name__}: {one_line(error)}"

    def _read_files(self) -> Iterator[Path]:
        """Return the files that are read: beside the serialized tokenizer, no other vocabulary is."""
        is_whole = any(path.name == _SERIALIZED for path in self.vocabularies)
        unread = [path for path in self.vocabularies if is_whole and path.name != _SERIALIZED]
        return (path for path in self._files if path not in unread)

    def _binary(self) -> Path | None:
        """Return a file of SentencePiece's or tiktoken's, where there is no other vocabulary."""
        found = self.vocabularies
        return found[0] if found and all(path.suffix in (".model", ".tiktoken") for path in found) else None

    def _missing_packages(self) -> str | None:
        """Return the packages that transformers converts the only vocabulary with."""
        found = self._binary()
        if found is None:
            return None
        packages = ("tiktoken",) if _is_tiktoken(found) else ("sentencepiece", "google.protobuf")
        missing = ", ".join(name.removeprefix("google.") for name in packages if not _is_installed(name))
        if not missing:
            return None
        return f"{found.name} needs packages that are not installed, {missing}: pip install 'omniquant-pl[tokenizers]'"


def _has_code(config: Path) -> bool:
    try:
        return "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _json_error(path: Path) -> str | None:
    if path.suffix != ".json":
        return None
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{path.name} is not JSON ({one_line(error)}); is the download complete? Fetch it again"
    return None


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.match(file.read(4096)) is not None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # of the package around it; of one that is hidden
        return False
