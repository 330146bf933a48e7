"""Token ids from text and from .npy files, checked against the model's vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.data.text import Role, key_of
from omniquant_pl.errors import ConfigurationError

__all__ = ["check_vocabulary", "encode", "read_tokens"]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenize a text of any length, with the special tokens that the tokenizer adds by itself.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.

    Returns:
        Token ids, int64 [tokens].
    """
    ids = tokenizer(text, verbose=False)["input_ids"]  # quiet about texts beyond the positions
    return torch.tensor(ids, dtype=torch.int64)


def read_tokens(path: Path, role: Role) -> Tensor:
    """Read token ids from a .npy file; nothing pickled is accepted.

    Args:
        path: The file: integers [windows, length] or a stream [tokens].
        role: Which key the path stands in.

    Returns:
        Token ids, int64, of the file's shape.

    Raises:
        ConfigurationError: If it is not a .npy file or not an integer array of that shape.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigurationError(key_of(role), f"cannot read '{path}': {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = getattr(array, "dtype", "an archive")
        raise ConfigurationError(key_of(role), f"'{path}' holds {kind}, not integer token ids")
    if array.ndim not in (1, 2):
        message = f"'{path}' has shape {list(array.shape)}, not [windows, length] or [tokens]"
        raise ConfigurationError(key_of(role), message)
    return torch.from_numpy(array.astype(np.int64))


def check_vocabulary(
    tokens: Tensor, name: str, vocabulary_size: int, role: Role, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Refuse ids that the model has no embedding for.

    Args:
        tokens: int64, any shape.
        name: The file or dataset, for the error.
        vocabulary_size: Rows of the embedding.
        role: Which key is at fault.
        tokenizer: What has made the ids of text; null for ids that were given.

    Raises:
        ConfigurationError: If an id is negative or not below the vocabulary's size.
    """
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary_size)]
    if not wrong.numel():
        return
    number = int(wrong[0])
    if tokenizer is not None:
        message = (
            f"'{name}' has the token {tokenizer.convert_ids_to_tokens(number)!r} (id {number}), but the model has"
            f" {vocabulary_size} embeddings; was it added to the tokenizer alone, or is that another tokenizer?"
        )
    else:
        message = (
            f"'{name}' has token id {number}, outside 0 to {vocabulary_size - 1} of the"
            f" model's vocabulary of {vocabulary_size}; are the ids from another tokenizer?"
        )
    raise ConfigurationError(key_of(role), message)
