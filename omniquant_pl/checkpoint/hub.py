"""The Hugging Face Hub: whether it answers, and why it does not deliver, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from omniquant_pl.errors import one_line

__all__ = ["reach_hub", "why_not_delivered"]

_PATIENCE = 5.0
"""Seconds that the hub may take for the first sign of life."""


@contextmanager
def reach_hub(*settings: ModuleType) -> Iterator[str | None]:
    """Ask the hub once whether it is there; where it is not, keep libraries to their caches, without retries.

    Args:
        settings: Modules of libraries that read their ``HF_HUB_OFFLINE`` at each call, beside huggingface_hub's.

    Yields:
        Why the hub does not answer; ``None`` if it does.
    """
    from huggingface_hub import constants

    silence = _silence()
    modules = () if silence is None else (constants, *settings)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        vars(module)["HF_HUB_OFFLINE"] = True
    try:
        yield silence
    finally:
        for module, value in zip(modules, before, strict=True):
            vars(module)["HF_HUB_OFFLINE"] = value


def _silence() -> str | None:
    """Why the hub does not answer; any answer counts."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined] # httpx's, of any version

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (NetworkError, OSError) as error:
        return f"{constants.ENDPOINT} does not answer ({one_line(error)})"
    return None


def why_not_delivered(repository: str, error: Exception, silence: str | None) -> str:
    """Say in one line why the hub did not deliver a model, and what a person can do about it.

    Args:
        repository: Its id, ``owner/name``.
        error: What huggingface_hub raised.
        silence: Why the hub did not answer, if it did not.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, hub.GatedRepoError):
        return f"it is gated: accept its licence on {page}, then run hf auth login or set HF_TOKEN"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"there is no model {page}, or it is private and needs hf auth login or HF_TOKEN"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{page} has no branch {constants.DEFAULT_REVISION}"
    if silence is not None and isinstance(error, hub.LocalEntryNotFoundError):
        return f"{silence}, and it is not in the cache; download it where there is a connection, or give a local folder"
    return one_line(error)
