"""How a row of integer codes stands in 32-bit words, the first code in the lowest bits.

stream: one contiguous little-endian bit stream a row; codes of 3, 5, 6 and 7 bit straddle words. GPTQ's.
words: floor(32 / bits) codes a word, none straddles, the upper bits are zero. MLC's.
planes: what the packed products read. Columns are padded with zero codes to a multiple of 32, and the
width is cut into its binary digits, the lowest bits of a code in the widest plane: 3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1. A row is the streams of its planes, one after another.
"""

import torch

__all__ = ["ELEMENT", "LAYOUTS", "UNIT", "WORD_BITS", "padded_columns", "plane_widths", "words_per_row"]

WORD_BITS = 32
UNIT = 32  # columns of which rows in planes consist
LAYOUTS = {"stream": 0, "words": 1, "planes": 2}  # enum in omniquant.h
ELEMENT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum in omniquant.h


def plane_widths(bits: int) -> list[int]:
    """Return the widths of the planes of a code, the lowest bits first.

    Args:
        bits: code width.

    Returns:
        Powers of two, descending, whose sum is `bits`.
    """
    return [width for width in (8, 4, 2, 1) if bits & width]


def padded_columns(columns: int) -> int:
    """Columns of a row in planes: the next multiple of 32."""
    return -(-columns // UNIT) * UNIT


def words_per_row(columns: int, bits: int, layout: str) -> int:
    """Length of a packed row.

    Args:
        columns: codes of a row.
        bits: code width, 1 to 8.
        layout: a key of `LAYOUTS`.

    Returns:
        Number of 32-bit words.
    """
    if layout == "words":
        return -(-columns // (WORD_BITS // bits))
    if layout == "planes":
        columns = padded_columns(columns)
    return -(-columns * bits // WORD_BITS)
