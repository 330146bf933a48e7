"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["HubRepository"]


class HubRepository:
    """A model repository that may be written to; it is created where there is none.

    Args:
        name: ``owner/name``.
        private: Whether a new one is to be seen by its owner alone.

    Raises:
        ConfigurationError: If the name is none, nobody is logged in, or the hub refuses or does not answer.
    """

    def __init__(self, name: str, private: bool = False) -> None:
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise ConfigurationError("push", "nobody is logged in to the hub; run hf auth login, or set HF_TOKEN")
        if name.count("/") != 1:
            raise ConfigurationError("push", f"{name!r} is not of the form owner/name")
        self._name = name
        self._api = HfApi(library_name="omniquant-pl")
        with _in_one_line(name):
            self._api.create_repo(name, private=private, exist_ok=True)

    def upload(self, folder: Path) -> str:
        """Upload a folder in one commit, and return the address of the repository.

        Raises:
            ConfigurationError: If the hub refuses or does not answer.
        """
        with _in_one_line(self._name):
            self._api.upload_folder(repo_id=self._name, folder_path=folder, commit_message="Upload by omniquant-pl")
        return f"{self._api.endpoint}/{self._name}"


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Say what a person can do about an error of the hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined] # httpx's, of any version

    try:
        yield
    except HFValidationError as error:
        raise ConfigurationError("push", f"{name!r} cannot be the name of a repository: {error}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        reasons = {401: "the token is missing or not valid; run hf auth login, or set HF_TOKEN"}
        reasons[403] = f"the token may not write to {name}; it needs the right to write, and {name} to be yours"
        reason = reasons.get(code, error.server_message or str(error).splitlines()[0])
        raise ConfigurationError("push", f"the hub answered {code}: {reason}") from error
    except ValueError as error:  # the hub does not take the card
        raise ConfigurationError("push", " ".join(str(error).split())) from error
    except (NetworkError, OSError) as error:
        raise ConfigurationError("push", f"the hub cannot be reached: {error}") from error
