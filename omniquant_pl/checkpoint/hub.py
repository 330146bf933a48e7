"""The Hugging Face Hub: whether it answers, and why it does not deliver, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["hub_answers", "offline", "one_line", "why_not_delivered"]

_PATIENCE = 5.0
"""Seconds that the hub may take for the first sign of life."""


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, or the name of its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def hub_answers() -> bool:
    """Ask the hub once whether it is there; any answer counts, and offline mode is none."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined] # httpx's, of any version

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (NetworkError, OSError):
        return False
    return True


@contextmanager
def offline(*settings: ModuleType) -> Iterator[None]:
    """Keep libraries to what they have in their caches for a while.

    Args:
        settings: Modules of libraries that read their ``HF_HUB_OFFLINE`` at each call, beside huggingface_hub's.
    """
    from huggingface_hub import constants

    modules = (constants, *settings)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        vars(module)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            vars(module)["HF_HUB_OFFLINE"] = value


def why_not_delivered(repository: str, error: Exception, kind: str = "model") -> str:
    """Say in one line why the hub did not deliver a repository, and what a person can do about it.

    Args:
        repository: Its id, ``owner/name``.
        error: What huggingface_hub raised.
        kind: ``model`` or ``dataset``.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    if isinstance(error, hub.GatedRepoError):
        return f"it is gated: accept its licence on {page}, then log in with hf auth login or set HF_TOKEN"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"there is no such {kind} on {constants.ENDPOINT}, or it is private and needs hf auth login or HF_TOKEN"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"it has no branch {constants.DEFAULT_REVISION}: is it empty?"
    if isinstance(error, hub.IncompleteSnapshotError):
        return f"{constants.ENDPOINT} does not answer, and the copy in the cache lacks files: {one_line(error)}"
    if isinstance(error, hub.LocalEntryNotFoundError):
        return _not_cached(constants.is_offline_mode(), constants.ENDPOINT, error)
    return one_line(error)


def _not_cached(is_offline: bool, endpoint: str, error: Exception) -> str:
    advice = "download it where there is a connection, or give a local folder"
    if is_offline:
        return f"HF_HUB_OFFLINE is set, and it is not in the cache; {advice}"
    reason = one_line(error.__cause__ or error)
    return f"{endpoint} cannot be reached ({reason}), and it is not in the cache; {advice}"
