"""Token ids of texts that have been read before: reading and encoding them again takes seconds at every start."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.checkpoint.files import replace_file
from omniquant_pl.data.text import Text
from omniquant_pl.data.tokens import encode

__all__ = ["encode_stream"]

_log = logging.getLogger(__name__)


def encode_stream(tokenizer: PreTrainedTokenizerBase, text: Text) -> Tensor:
    """Tokenize a text as one stream, or find what that gave before in the assets folder of the Hugging Face cache.

    Args:
        tokenizer: The model's tokenizer. What one does that is code of its own is not kept: the code may change.
        text: The text; if it is known by an identity, it is only read if it has to be tokenized.

    Returns:
        Token ids, int64 [tokens], as :func:`~omniquant_pl.data.tokens.encode`.
    """
    rules = _rules(tokenizer)
    if rules is None:
        return encode(tokenizer, text.stream())
    identity = text.stream() if text.identity is None else text.identity
    name = hashlib.sha256(f"{len(rules)} {rules}{identity}".encode()).hexdigest()
    tokens = _find(name)
    if tokens is None:
        tokens = encode(tokenizer, text.stream())
        _keep(name, tokens)
    return tokens


def _rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Everything that decides how a text is tokenized; ``None`` where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    programs = [f"{package} {version(package)}" for package in ("transformers", "tokenizers")]
    options = [type(tokenizer).__name__, str(getattr(tokenizer, "split_special_tokens", None))]
    return "\n".join([*programs, *options, backend.to_str()])


def _folder() -> Path:
    return cached_assets_path("omniquant_pl", "tokens", "streams")


def _find(name: str) -> Tensor | None:
    """What was kept under a name; the archive has a checksum."""
    try:
        with np.load(_folder() / f"{name}.npz", allow_pickle=False) as archive:
            return torch.from_numpy(archive["tokens"].astype(np.int64))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _keep(name: str, tokens: Tensor) -> None:
    """Keeps tokens if there is a place for them; a run does not need it."""
    try:
        replace_file(_folder() / f"{name}.npz", partial(_write, tokens=tokens))
    except (OSError, ValueError) as error:  # the latter where a file stands in the way
        _log.debug("the tokens of a text cannot be kept: %s", error)


def _write(path: Path, tokens: Tensor) -> None:
    with path.open("wb") as file:  # of a path, numpy would add a suffix
        np.savez(file, tokens=tokens.numpy().astype(np.int32))
