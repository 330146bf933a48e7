"""Tokenizers of the kinds that checkpoints have, trained in a moment on Python's own documentation."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

__all__ = ["LLAMA3", "QWEN2", "TEKKEN", "TEXTS", "byte_level", "sentencepiece", "split"]

# As they stand in tokenizer.json of Llama 3, Qwen 2 and Mistral Nemo.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = (
    "Once upon a time",
    " two  spaces,   three;\ttab\nline\n\n  def f(x):\n    return x**2  # 3.14159 and 1234567",
    "It's they're I'VE we'll; HTTPServer camelCase X",
    "Ünïcödé ♥ 漢字かな Привет 🙂",
)

_CORPUS = [text for _, text in sorted(topics.items())][:12]
_SPACE = "▁"


def split(expression: str) -> PreTokenizer:
    """Cuts text with an expression, then takes bytes."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def _finish(tokenizer: Tokenizer, adds_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if adds_bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level(
    pre_tokenizer: PreTokenizer | None = None, adds_bos: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; without a pre-tokenizer GPT-2's."""
    tokenizer = Tokenizer(BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _finish(tokenizer, adds_bos)


def sentencepiece(style: str = "legacy") -> PreTrainedTokenizerFast:
    """SentencePiece BPE as transformers converts it: bytes, then pieces, merges made of all pairs of pieces.

    Args:
        style: legacy, with normalizers that put a space in front of text (LLaMA 2); metaspace (newer); gemma, without
            a space in front.
    """
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_CORPUS, BpeTrainer(vocab_size=400, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    pairs = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    merges = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", _SPACE)
    if style == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    elif style == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finish(tokenizer, adds_bos=True)
