"""Text from the Hugging Face hub.

The named datasets, their splits and the way their rows are joined are those of OmniQuant (arXiv
2308.13137) and GPTQ, so that perplexities compare with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from omniquant_pl.checkpoint.hub import reach_hub
from omniquant_pl.data.files import SUFFIXES
from omniquant_pl.data.text import Role, Text, checked_texts, key_of, wrong_column
from omniquant_pl.errors import ConfigurationError, one_line

__all__ = ["HUB_DATASETS", "HubSplit", "read_hub"]


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub dataset and the rows of it that are used."""

    repository: str
    """Its id on the hub."""
    split: str
    """Its name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keywords of ``datasets.load_dataset``."""
    column: str = "text"
    """The column that holds the text."""
    rows: slice | None = None
    """The rows that are used; null: all."""
    within_documents: bool = False
    """Windows are cut inside one row, which are then read lazily."""


def _wikitext2(split: str) -> HubSplit:
    return HubSplit("Salesforce/wikitext", split, {"name": "wikitext-2-raw-v1"})


def _c4(split: str, file: str) -> HubSplit:
    options = {"data_files": {split: f"en/{file}.json.gz"}}
    return HubSplit("allenai/c4", split, options, within_documents=True)


def _ptb(split: str) -> HubSplit:
    # The main branch is a loading script, which `datasets` no longer runs.
    options = {
        "data_files": {split: f"penn_treebank/{split}/*.parquet"},
        "revision": "refs/convert/parquet",
    }
    return HubSplit("ptb-text-only/ptb_text_only", split, options, column="sentence")


def _pile(rows: slice) -> HubSplit:
    return HubSplit("mit-han-lab/pile-val-backup", "validation", rows=rows)


HUB_DATASETS: dict[str, dict[Role, HubSplit]] = {
    "wikitext2": {"calibration": _wikitext2("train"), "evaluation": _wikitext2("test")},
    "c4": {
        "calibration": _c4("train", "c4-train.00000-of-01024"),
        "evaluation": _c4("validation", "c4-validation.00000-of-00008"),
    },
    "ptb": {"calibration": _ptb("train"), "evaluation": _ptb("validation")},
    "pile": {"calibration": _pile(slice(1000)), "evaluation": _pile(slice(1000, 2000))},
}


def read_hub(name: str, role: Role) -> Text:
    """Read a dataset of the hub.

    Args:
        name: A key of :data:`HUB_DATASETS`, or the id of any dataset with a column ``text``; of
            the latter, calibration reads the split ``train``, evaluation ``test`` or else
            ``validation``.
        role: Which split is read.

    Returns:
        Its documents.

    Raises:
        ConfigurationError: If it cannot be loaded or has no such split or column.
    """
    if name not in HUB_DATASETS:
        return Text(_texts(_other(name, role), name, "text", role))
    source = HUB_DATASETS[name][role]
    rows = _load(source.repository, role, split=source.split, **source.options)
    if source.within_documents:
        return Text(rows[source.column], within_documents=True)
    if source.rows is not None:
        rows = rows.select(range(*source.rows.indices(len(rows))))
    return Text(_texts(rows, name, source.column, role))


def _other(name: str, role: Role) -> Any:
    """Return the rows of a dataset nobody named here."""
    splits = _load(name, role)
    wanted = ("train",) if role == "calibration" else ("test", "validation")
    for split in wanted:
        if split in splits:
            return splits[split]
    message = f"'{name}' has no split {' or '.join(wanted)}; splits found: {', '.join(splits)}"
    raise ConfigurationError(key_of(role), message)


def _texts(rows: Any, name: str, column: str, role: Role) -> Sequence[str]:
    if column not in rows.column_names:
        raise wrong_column(f"'{name}'", column, rows.column_names, role)
    return checked_texts(list(rows[column]), f"'{name}'", column, role)


def _load(repository: str, role: Role, **options: Any) -> Any:
    """``datasets.load_dataset`` with an error that says which key asked for it.

    It would retry for half a minute where the hub does not answer; then only its cache is asked.
    """
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined] # httpx's, of any version

    datasets = _datasets(role)
    failures = (NetworkError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    silence = None
    try:
        with reach_hub(datasets.config) as silence:
            return datasets.load_dataset(repository, **options)
    except failures as error:
        is_absent = silence is not None and isinstance(error, ConnectionError)
        reason = f"{silence}, and the dataset is not in the cache" if is_absent else one_line(error)
        known = ", ".join(("builtin", *HUB_DATASETS))
        message = (
            f"cannot load '{repository}' from the hub: {reason}; accepted are {known}, the id of a"
            f" hub dataset, or the path of a {', '.join(SUFFIXES)} file"
        )
        raise ConfigurationError(key_of(role), message) from error


def _datasets(role: Role) -> ModuleType:
    try:
        return import_module("datasets")  # slow to import, and not needed for local text
    except ImportError as error:
        message = "hub datasets need the package 'datasets'; 'builtin' and .txt files do not"
        raise ConfigurationError(key_of(role), message) from error
