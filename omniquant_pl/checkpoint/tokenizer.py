"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

__all__ = ["open_tokenizer"]

_log = logging.getLogger(__name__)

_NO_TOKENIZER = (ValueError, OSError, KeyError)
_BROKEN_CODE = (AttributeError, ImportError, NotImplementedError, TypeError)


def open_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a model folder, or ``None`` where it has none.

    One that is code of its own runs only if that is trusted, and may be written for another transformers: then it is
    logged and counts as none.

    Args:
        folder: The model folder.
        trust_remote_code: Whether code that comes with it may run.
    """
    errors: tuple[type[Exception], ...] = _NO_TOKENIZER
    if trust_remote_code:
        errors += _BROKEN_CODE
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except errors as error:
        if isinstance(error, _BROKEN_CODE):
            _log.warning("the tokenizer in %s does not run: %r", folder, error)
        return None
    return cast(PreTrainedTokenizerBase, tokenizer)
