"""Windows of token ids, cut as OmniQuant (arXiv 2308.13137) and GPTQ cut them.

The random draws are those of Python's ``random`` in the original's order: the same tokenizer, text
and seed give the original's windows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omniquant_pl.data.text import Role, key_of
from omniquant_pl.errors import ConfigurationError

__all__ = ["CutSpec", "chunk", "first_windows", "sample_documents", "sample_stream"]

_LEAST_DRAWS = 1000


@dataclass(frozen=True)
class CutSpec:
    """Which windows are cut, and for whom."""

    name: str
    """The dataset, for errors."""
    role: Role
    """Whose windows, for errors."""
    samples: int
    """How many random windows; adjacent windows are as many as there are."""
    length: int
    """Tokens a window."""
    seed: int
    """Of the random draws."""


def sample_stream(tokens: Tensor, spec: CutSpec) -> Tensor:
    """Cut random windows from one stream.

    Args:
        tokens: int64 [tokens].
        spec: What to cut.

    Returns:
        int64 [samples, length].

    Raises:
        ConfigurationError: If the stream is not longer than a window.
    """
    if len(tokens) <= spec.length:
        raise _too_short(f"'{spec.name}' has {len(tokens)} tokens", spec)
    draws = random.Random(spec.seed)
    return torch.stack([_random_window(tokens, spec, draws) for _ in range(spec.samples)])


def sample_documents(encode: Callable[[str], Tensor], documents: Sequence[str], spec: CutSpec) -> Tensor:
    """Cut random windows, each from a random document that is longer than a window.

    Args:
        encode: Turns a text into token ids, int64 [tokens].
        documents: The texts; only those drawn are read.
        spec: What to cut.

    Returns:
        int64 [samples, length].

    Raises:
        ConfigurationError: If as many draws as there are documents, and at least a thousand, find
            no document that is long enough.
    """
    draws = random.Random(spec.seed)
    windows = []
    for _ in range(spec.samples):
        tokens = _long_document(encode, documents, spec, draws)
        windows.append(_random_window(tokens, spec, draws))
    return torch.stack(windows)


def chunk(tokens: Tensor, spec: CutSpec) -> Tensor:
    """Cut a stream into all its adjacent windows; the tail is dropped.

    Args:
        tokens: int64 [tokens].
        spec: What to cut; its samples and seed play no part.

    Returns:
        int64 [tokens // length, length].

    Raises:
        ConfigurationError: If the stream does not fill one window.
    """
    windows = len(tokens) // spec.length
    if windows == 0:
        raise _too_short(f"'{spec.name}' has {len(tokens)} tokens", spec)
    return tokens[: windows * spec.length].view(windows, spec.length)


def first_windows(windows: Tensor, spec: CutSpec) -> Tensor:
    """Return the first windows of a file, in order.

    Args:
        windows: int64 [windows, any length].
        spec: Its samples say how many are wanted.

    Returns:
        int64 [samples, any length].

    Raises:
        ConfigurationError: If there are fewer.
    """
    if len(windows) < spec.samples:
        message = f"{spec.samples} windows are asked for, but '{spec.name}' has {len(windows)} rows"
        raise ConfigurationError("data.samples", message)
    return windows[: spec.samples]


def _random_window(tokens: Tensor, spec: CutSpec, draws: random.Random) -> Tensor:
    start = draws.randint(0, len(tokens) - spec.length - 1)
    return tokens[start : start + spec.length]


def _long_document(
    encode: Callable[[str], Tensor],
    documents: Sequence[str],
    spec: CutSpec,
    draws: random.Random,
) -> Tensor:
    """Return a random document that is longer than a window, int64 [tokens]."""
    count, longest = len(documents), 0
    for _ in range(max(_LEAST_DRAWS, count) if count else 0):
        tokens = encode(documents[draws.randint(0, count - 1)])
        if len(tokens) > spec.length:
            return tokens
        longest = max(longest, len(tokens))
    raise _too_short(f"the longest document found in '{spec.name}' has {longest} tokens", spec)


def _too_short(found: str, spec: CutSpec) -> ConfigurationError:
    wanted = f"data.samples={spec.samples} windows" if spec.role == "calibration" else "windows"
    message = (
        f"{found}, too few for {wanted} of data.sequence_length={spec.length};"
        " give more text or a smaller data.sequence_length"
    )
    return ConfigurationError(key_of(spec.role), message)
