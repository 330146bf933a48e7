"""Pure-torch kernels of `pack` and `unpack`: one shift a code of a word, over all words at once.

Words are int32 throughout: a left shift wraps, and what an arithmetic right shift brings in is masked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from omniquant_pl.ops._checks import check_codes, check_words
from omniquant_pl.ops._layouts import WORD_BITS, padded_columns, plane_widths, words_per_row

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, bits: int, layout: str) -> Tensor:
    """See `omniquant_pl.ops.pack`."""
    check_codes(codes, bits, layout)
    codes = codes & (2**bits - 1)
    columns = codes.shape[1]
    if layout == "words":
        return _pack_whole(_padded(codes, WORD_BITS // bits), bits)
    codes = _padded(codes, WORD_BITS)
    if layout == "stream":
        return _pack_stream(codes, bits)[:, : words_per_row(columns, bits, layout)].contiguous()
    planes, shift = [], 0
    for width in plane_widths(bits):
        planes.append(_pack_whole((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=1)


def unpack(words: Tensor, bits: int, columns: int, layout: str) -> Tensor:
    """See `omniquant_pl.ops.unpack`."""
    check_words(words, bits, columns, layout)
    if layout == "words":
        codes = _unpack_whole(words, bits)
    elif layout == "stream":
        codes = _unpack_stream(F.pad(words, (0, -words.shape[1] % bits)), bits)
    else:
        codes = _unpack_planes(words, bits, padded_columns(columns))
    return codes[:, :columns].contiguous()


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return F.pad(codes, (0, -codes.shape[1] % multiple))


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, words * k] into words of k = floor(32 / bits) codes."""
    each = WORD_BITS // bits
    codes = codes.view(len(codes), codes.shape[1] // each, each)
    words = codes[:, :, 0].int()
    for index in range(1, each):
        words |= codes[:, :, index].int() << (index * bits)
    return words


def _unpack_whole(words: Tensor, bits: int) -> Tensor:
    codes = [(words >> shift) & (2**bits - 1) for shift in range(0, WORD_BITS - bits + 1, bits)]
    return torch.stack([code.to(torch.uint8) for code in codes], dim=2).flatten(1)


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, 32 k] into words [rows, bits * k]: 32 codes fill `bits` words exactly."""
    codes = codes.view(len(codes), codes.shape[1] // WORD_BITS, WORD_BITS)
    words = torch.zeros(*codes.shape[:2], bits, dtype=torch.int32, device=codes.device)
    for index in range(WORD_BITS):
        word, shift = divmod(index * bits, WORD_BITS)
        code = codes[:, :, index].int()
        words[:, :, word] |= code << shift
        if shift + bits > WORD_BITS:
            words[:, :, word + 1] |= code >> (WORD_BITS - shift)
    return words.flatten(1)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Words [rows, bits * k] into codes [rows, 32 k]."""
    words = words.view(len(words), words.shape[1] // bits, bits)
    codes = torch.empty(*words.shape[:2], WORD_BITS, dtype=torch.uint8, device=words.device)
    for index in range(WORD_BITS):
        word, shift = divmod(index * bits, WORD_BITS)
        code = words[:, :, word] >> shift
        if shift + bits > WORD_BITS:
            low = WORD_BITS - shift
            code = (code & (2**low - 1)) | (words[:, :, word + 1] << low)
        codes[:, :, index] = code & (2**bits - 1)
    return codes.flatten(1)


def _unpack_planes(words: Tensor, bits: int, columns: int) -> Tensor:
    codes = torch.zeros(len(words), columns, dtype=torch.uint8, device=words.device)
    begin, shift = 0, 0
    for width in plane_widths(bits):
        end = begin + columns * width // WORD_BITS
        codes |= _unpack_whole(words[:, begin:end], width) << shift
        begin, shift = end, shift + width
    return codes
