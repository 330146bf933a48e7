"""Text by the name of its dataset: what ships with Python, local files, the hub."""

from __future__ import annotations

from pathlib import Path

from omniquant_pl.data.builtin import BuiltinDocuments, Split, builtin_identity
from omniquant_pl.data.files import SUFFIXES, read_file, resolve
from omniquant_pl.data.hub import HUB_DATASETS, read_hub
from omniquant_pl.data.text import Role, Text

__all__ = ["dataset_key", "is_path", "read_text"]

BUILTIN = "builtin"


def is_path(name: str) -> bool:
    """Tell a local file from the name of a dataset; a path is never looked for on the hub.

    Args:
        name: An entry of the configuration.

    Returns:
        True for a known suffix, a leading ``/``, ``.`` or ``~``, or a thing that exists on disk.
        The names of the known datasets stay names.
    """
    if name == BUILTIN or name in HUB_DATASETS:
        return False
    marked = name.startswith(("/", ".", "~")) or name.lower().endswith(SUFFIXES)
    return marked or Path(name).exists()


def dataset_key(name: str) -> str:
    """Return the name under which results are reported.

    Args:
        name: An entry of the configuration.

    Returns:
        The stem of a path, any other name as it is.
    """
    return Path(name).stem if is_path(name) else name


def read_text(name: str, role: Role) -> Text:
    """Read the text of a dataset.

    Args:
        name: ``builtin``, a name or id on the hub (see :func:`~omniquant_pl.data.hub.read_hub`),
            or a local .txt, .jsonl or .parquet file.
        role: Which split is read; a local file has only one.

    Returns:
        Its documents.

    Raises:
        ConfigurationError: If it cannot be found or read, or has no text where it should.
    """
    if name == BUILTIN:
        split: Split = "train" if role == "calibration" else "evaluation"
        return Text(BuiltinDocuments(split), identity=builtin_identity(split))
    if is_path(name):
        return read_file(resolve(name, role), role)
    return read_hub(name, role)
