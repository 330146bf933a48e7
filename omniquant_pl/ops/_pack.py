"""Integer codes in 32-bit words, and back. `_layouts` says what each layout is."""

import torch
from torch import Tensor

from omniquant_pl.ops import _default_pack
from omniquant_pl.ops._checks import check_codes, check_words
from omniquant_pl.ops._compiled import COMPILED
from omniquant_pl.ops._layouts import words_per_row
from omniquant_pl.ops._library import register

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    """Put codes into words. Of a code that is too wide the upper bits are dropped.

    Args:
        codes: [rows, columns], uint8.
        bits: code width, 1 to 8.
        layout: "stream", "words" or "planes".

    Returns:
        [rows, words_per_row], int32, contiguous. Bits that hold no code are zero.

    Raises:
        ValueError: `codes` is not 2-D, or the width or the layout is unknown.
        TypeError: `codes` is not uint8.
    """
    result: Tensor = _pack(codes, bits, layout)
    return result


def unpack(words: Tensor, bits: int, columns: int, layout: str) -> Tensor:
    """Take the codes out of words: the inverse of `pack`.

    Args:
        words: [rows, words_per_row], int32.
        bits: code width, 1 to 8.
        columns: codes of a row.
        layout: "stream", "words" or "planes".

    Returns:
        [rows, columns], uint8, contiguous.

    Raises:
        ValueError: a row has another number of words, or the width or the layout is unknown.
        TypeError: `words` is not int32.
    """
    result: Tensor = _unpack(words, bits, columns, layout)
    return result


def _fake_pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    check_codes(codes, bits, layout)
    return codes.new_empty((codes.shape[0], words_per_row(codes.shape[1], bits, layout)), dtype=torch.int32)


def _fake_unpack(words: Tensor, bits: int, columns: int, layout: str) -> Tensor:
    check_words(words, bits, columns, layout)
    return words.new_empty((words.shape[0], columns), dtype=torch.uint8)


_pack = register(
    "pack(Tensor codes, int bits, str layout) -> Tensor",
    default=_default_pack.pack,
    fake=_fake_pack,
    compiled=COMPILED,
)
_unpack = register(
    "unpack(Tensor words, int bits, SymInt columns, str layout) -> Tensor",
    default=_default_pack.unpack,
    fake=_fake_unpack,
    compiled=COMPILED,
)
