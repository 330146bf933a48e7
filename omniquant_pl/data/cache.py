"""Token ids of the embedded text: reading and encoding it again takes seconds at every start."""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl import __version__
from omniquant_pl.data.text import Text
from omniquant_pl.data.tokens import encode
from omniquant_pl.utils.files import replace_file

__all__ = ["encode_stream"]

_log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size


def encode_stream(tokenizer: PreTrainedTokenizerBase, text: Text) -> Tensor:
    """Tokenize a text as one stream.

    What a text with an identity gives is kept in the assets folder of the Hugging Face cache, and found there the next
    time without reading the text. Other texts are nobody's but the user's, and are never kept.

    Args:
        tokenizer: The model's tokenizer. What one gives that is code of its own is not kept: the code may change.
        text: The text.

    Returns:
        Token ids, int64 [tokens], as :func:`~omniquant_pl.data.tokens.encode`.
    """
    rules = None if text.identity is None else _rules(tokenizer)
    if rules is None:
        return encode(tokenizer, text.stream())
    name = hashlib.sha256(f"{text.identity} {rules}".encode()).hexdigest()
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
    try:
        rules = backend.to_str()
    except Exception:  # noqa: BLE001 (of no particular class: a part is written in Python)
        return None
    programs = [f"omniquant_pl {__version__}", *(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))]
    options = [type(tokenizer).__name__, str(getattr(tokenizer, "split_special_tokens", None))]
    return "\n".join([*programs, *options, rules])


def _file(name: str) -> Path:
    return cached_assets_path("omniquant_pl", "tokens", "streams") / f"{name}.tokens"


def _find(name: str) -> Tensor | None:
    """Return what was kept under a name: a digest, and the int32 that it is of."""
    try:
        content = _file(name).read_bytes()
    except (OSError, ValueError):
        return None
    digest, tokens = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(tokens).digest() != digest:
        return None
    return torch.from_numpy(np.frombuffer(tokens, np.int32).astype(np.int64))


def _keep(name: str, tokens: Tensor) -> None:
    """Keep tokens if there is a place for them; a run does not need it."""
    content = tokens.numpy().astype(np.int32).tobytes()
    try:
        replace_file(_file(name), lambda path: path.write_bytes(hashlib.sha256(content).digest() + content))
    except (OSError, ValueError) as error:  # the latter where a file stands in the way of the folder
        _log.debug("the tokens of a text cannot be kept: %s", error)
