"""Text that every Python installation carries: its documentation topics and docstrings.

The help topics of ``pydoc`` and the docstrings of the standard library give about three megabytes
of technical English without a network. A document is one topic or one module's docstrings. Whole
packages go to one split by a hash of their name, so that text never stands on both sides and the
split is the same for every Python version.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, overload

from typing_extensions import override

from omniquant_pl.errors import ConfigurationError

__all__ = ["BuiltinDocuments", "Split", "builtin_identity", "builtin_text", "document_split"]

Split = Literal["train", "evaluation"]

_RULES = 1
"""Counts the ways in which this module has made texts of the same files."""
_EVALUATION_SHARE = 0.07
_SKIPPED = frozenset(
    (
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    )
)


_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of statements that hold lists of statements, or what has such lists."""


@lru_cache(maxsize=2)
def builtin_text(split: Split) -> str:
    """Read one split of the embedded text.

    Args:
        split: ``train`` (about 93 %) or ``evaluation``.

    Returns:
        The split's documents in sorted order, joined by two newlines.

    Raises:
        ConfigurationError: If this Python comes without the topics or the library's sources.
    """
    documents = _documents()
    return "\n\n".join(text for name, text in documents if document_split(name) == split)


class BuiltinDocuments(Sequence[str]):
    """One split as a text's only document, which is put together when it is read.

    Args:
        split: As of :func:`builtin_text`.
    """

    def __init__(self, split: Split) -> None:
        self._split: Split = split

    @override
    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    @override
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return [builtin_text(self._split)][index]


def builtin_identity(split: Split) -> str:
    """Tell a split from that of another Python, or of this one with other files, without reading them all.

    Args:
        split: As of :func:`builtin_text`.

    Returns:
        A digest of the help topics, and of the sources' names, sizes and times.

    Raises:
        ConfigurationError: If this Python comes without the topics.
    """
    modules = [(name, *_changed(path)) for name, path in _modules(_library())]
    found = (_RULES, split, sys.version, _topics(), modules)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _changed(path: Path) -> tuple[int, int]:
    """Size and time of a file; of one that cannot be read, whose docstrings do not count, none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def document_split(name: str) -> Split:
    """Tell which split a document belongs to.

    Args:
        name: ``topic:<topic>`` or a dotted module name, of which only the first part counts. The
            pure-Python twins of extension modules (``_pydatetime``) go where their module goes.

    Returns:
        The split, a function of the name alone.
    """
    group = name if name.startswith("topic:") else name.split(".")[0].removeprefix("_py")
    digest = hashlib.sha256(group.encode()).digest()
    return "evaluation" if digest[0] < _EVALUATION_SHARE * 256 else "train"


@lru_cache(maxsize=1)
def _documents() -> tuple[tuple[str, str], ...]:
    """Return the name and text of every document; a docstring stays in the first module that has it."""
    documents = [(f"topic:{name}", inspect.cleandoc(text)) for name, text in _topics()]
    owners: dict[str, str] = {}  # docstring -> the first module that has it
    for name, path in _modules(_library()):
        own = {text: name for text in _docstrings(path) if text not in owners}
        owners.update(own)
        if own:
            documents.append((name, "\n\n".join(own)))
    if not owners:
        raise ConfigurationError("data.dataset", _missing(f"no Python source in {_library()}"))
    return tuple(documents)


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigurationError("data.dataset", _missing("no module pydoc_data")) from error
    return sorted(topics.items())


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(root: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Dotted names and sources of the modules under a folder, sorted by name."""
    for path in sorted(root.iterdir(), key=lambda entry: entry.name) if root.is_dir() else ():
        if path.name in _SKIPPED or not path.stem.isidentifier():
            continue
        if path.is_dir():
            yield from _modules(path, f"{prefix}{path.name}.")
        elif path.suffix == ".py":
            yield prefix + path.stem, path


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions, without importing it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text  # cleaned by ast already


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything that statements are in, level by level as ``ast.walk``, without their expressions: most of a tree."""
    level: list[ast.AST] = [tree]
    while level:
        yield from level
        lists = [getattr(node, field, ()) for node in level for field in node._fields if field in _BODIES]
        level = [child for children in lists for child in children]


def _missing(what: str) -> str:
    return (
        f"'builtin' reads the documentation of the standard library, but this Python has {what};"
        " install the full standard library or name another dataset, a .txt file for instance"
    )
