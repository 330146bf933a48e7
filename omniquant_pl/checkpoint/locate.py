"""From what the user wrote as ``model.path`` to a folder on disk."""

from __future__ import annotations

from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["embedded_models", "from_any_folder", "is_hub_id", "locate_model"]

_EMBEDDED = Path(__file__).parent.parent / "models"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "README.md", "LICENSE*"]
_CODE = ["*.py"]


def embedded_models() -> tuple[str, ...]:
    """Returns the names of the checkpoints that come with the package."""
    return tuple(sorted(path.parent.name for path in _EMBEDDED.glob("*/config.json")))


def locate_model(path: str, with_code: bool = False) -> Path:
    """Returns the folder of an embedded model, a local folder, or a downloaded hub repository.

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
    return _download(path, _HUB_FILES + (_CODE if with_code else []))


def from_any_folder(path: str) -> str:
    """Return a model path that means the same in any working folder: that of a local folder made absolute."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if path and folder.is_dir() else path


def is_hub_id(path: str) -> bool:
    """Whether a model path is ``owner/name`` on the hub, and no folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir()


def _download(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            "model.path",
            f"there is no folder {repository!r}, and the hub did not deliver it: {error}",
        ) from error
