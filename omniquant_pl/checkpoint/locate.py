"""From what the user wrote as ``model.path`` to a folder on disk."""

from __future__ import annotations

import logging
from pathlib import Path

from omniquant_pl.checkpoint.hub import reach_hub, why_not_delivered
from omniquant_pl.checkpoint.hub_files import CODE, IGNORED, USED, shards_of
from omniquant_pl.checkpoint.weight_files import INDEX, SINGLE
from omniquant_pl.errors import ConfigurationError, one_line

__all__ = ["embedded_models", "from_any_folder", "is_hub_id", "locate_model"]

_log = logging.getLogger(__name__)
_EMBEDDED = Path(__file__).parent.parent / "models"


def embedded_models() -> tuple[str, ...]:
    """Return the names of the checkpoints that come with the package."""
    return tuple(sorted(path.parent.name for path in _EMBEDDED.glob("*/config.json")))


def locate_model(path: str, with_code: bool = False) -> Path:
    """Return the folder of an embedded model, a local folder, or a downloaded hub repository.

    Args:
        path: Name of an embedded model, path of a folder, or hub id ``owner/name``.
        with_code: Whether Python code that comes with a hub repository is downloaded as well.

    Raises:
        ConfigurationError: If there is no such model.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if path in embedded_models():
        return _EMBEDDED / path
    if not is_hub_id(path):
        known = ", ".join(embedded_models())
        raise ConfigurationError(
            "model.path",
            f"there is no folder {path!r}; give a local folder, a hub id owner/name, or one of: {known}",
        )
    return _download(path, [*USED, *(CODE if with_code else ())])


def from_any_folder(path: str) -> str:
    """Return a model path that means the same in any working folder: that of a local folder made absolute."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if path and folder.is_dir() else path


def is_hub_id(path: str) -> bool:
    """Return whether a model path is ``owner/name`` on the hub, and no folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir()


def _download(repository: str, used: list[str]) -> Path:
    """Download one file of weights if there is one, as transformers reads them, else the shards of the index."""
    folder = _snapshot(repository, [*used, SINGLE, INDEX])
    shards = [] if (folder / SINGLE).is_file() or not (folder / INDEX).is_file() else shards_of(folder / INDEX)
    return _snapshot(repository, [*used, INDEX, *shards]) if shards else folder


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined] # httpx's, of any version

    silence = None
    try:
        with reach_hub() as silence:
            return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=list(IGNORED)))
    except (NetworkError, HFValidationError, OSError) as error:
        if hasattr(error, "snapshot_path"):  # the hub does not answer, and the cache lacks some of the files
            _log.warning("%s; going on with %s", one_line(error).split(". ")[0], error.snapshot_path)
            return Path(error.snapshot_path)
        reason = why_not_delivered(repository, error, silence)
        message = f"there is no folder {repository!r}, and it cannot be downloaded: {reason}"
        raise ConfigurationError("model.path", message) from error
