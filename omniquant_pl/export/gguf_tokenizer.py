"""The vocabulary of a GGUF file, from transformers' tokenizer.

llama.cpp has two kinds that our families use: byte-level BPE, ``gpt2``, which names the way in which text is cut before
the merges, and SentencePiece BPE, ``llama``, which has scores in the place of merges. Read in src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from omniquant_pl.export.gguf_metadata import Value

__all__ = ["InexpressibleTokenizerError", "Vocabulary", "read_vocabulary"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama_token_type

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED = (rf"{_START}{_UPPER}*{_LOWER}+", rf"{_START}{_UPPER}+{_LOWER}*")
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}": (("dbrx", False), ("llama-bpe", True)),
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_TAIL}": (("qwen2", False),),
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_AND_SLASH}|{_TAIL}": (("tekken", True),),
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASH}|{_TAIL}": (
        ("gpt-4o", False),
    ),
}
"""By the expression that text is cut with: llama.cpp's names for it, and whether they leave merges out for words that
are tokens."""


class InexpressibleTokenizerError(ValueError):
    """A tokenizer that llama.cpp has nothing like; the message says why."""


@dataclass(frozen=True)
class Vocabulary:
    """What stands in the file.

    Attributes:
        model: ``gpt2``, ``llama``, or ``none`` where only the number of tokens is known.
        tokens: The tokens by id.
        types: What they are, numbers of llama.cpp's ``llama_token_type``.
        settings: Further values by their keys after ``tokenizer.``.
        merges: Merges, the first before the others, for ``gpt2``.
        scores: Scores by id, the highest first, for ``llama``.
    """

    model: str
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()
    settings: Mapping[str, Value] = field(default_factory=dict)
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()

    @property
    def arrays(self) -> dict[str, Sequence[Any]]:
        """Its lists by their keys."""
        lists = {"tokens": self.tokens, "token_type": self.types, "merges": self.merges, "scores": self.scores}
        return {f"tokenizer.ggml.{key}": values for key, values in lists.items() if values}

    @property
    def values(self) -> dict[str, Value]:
        """Its other values by their keys."""
        return {"tokenizer.ggml.model": self.model} | {f"tokenizer.{key}": v for key, v in self.settings.items()}


def read_vocabulary(tokenizer: PreTrainedTokenizerBase | None, size: int) -> Vocabulary:
    """Return the vocabulary of a model, without tokens if it has no tokenizer.

    A normalizer to NFC, as Qwen's, is left out: llama.cpp has none.

    Args:
        tokenizer: The model's tokenizer.
        size: Rows of its embedding; those without a token get one that nothing is ever turned into.

    Raises:
        InexpressibleTokenizerError: If llama.cpp has nothing like it.
    """
    if tokenizer is None:
        return Vocabulary("none")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InexpressibleTokenizerError("it is none of the tokenizers library")
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InexpressibleTokenizerError(f"it is of type {model['type']}, or marks parts of words")
    if not model["merges"]:  # what transformers makes up for a folder that has none
        return Vocabulary("none")
    tokens, types = _tokens(state, size)
    settings = _special(tokenizer)
    if model.get("byte_fallback"):
        settings["ggml.add_space_prefix"] = _prepends_space(state)
        return Vocabulary("llama", tokens, types, settings, scores=_scores(state, tokens))
    settings["ggml.pre"] = _pre_tokenizer(state)
    merges = [" ".join(pair) for pair in _merges(model)]
    return Vocabulary("gpt2", tokens, types, settings, merges)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merge as pairs; older files have them in one string."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _tokens(state: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    model = state["model"]
    found = {index: (token, _type(token, model)) for token, index in model["vocab"].items()}
    for added in state["added_tokens"]:
        text = added["content"]
        if added["special"]:
            kind = _UNKNOWN if model.get("byte_fallback") and text == model.get("unk_token") else _CONTROL
        else:
            kind, text = _USER_DEFINED, text.replace(_SPACE, " ")
        found[added["id"]] = (text, kind)
    if max(found) >= size:
        raise InexpressibleTokenizerError(f"it has a token of number {max(found)}, the model an embedding of {size}")
    tokens, types = zip(*(found.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(size)), strict=True)
    if len(set(tokens)) < size:
        raise InexpressibleTokenizerError("two of its tokens are the same text")
    return list(tokens), list(types)


def _type(token: str, model: Mapping[str, Any]) -> int:
    if not model.get("byte_fallback"):
        return _NORMAL
    if token == model.get("unk_token"):
        return _UNKNOWN
    return _BYTE if _BYTE_TOKEN.fullmatch(token) else _NORMAL


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """Numbers of special tokens, which of them are put around text, and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {own: getattr(tokenizer, f"{name}_token_id") for name, own in names.items()}
    settings: dict[str, Value] = {f"ggml.{own}_token_id": i for own, i in numbers.items() if i is not None}
    ids = tokenizer("a")["input_ids"]
    settings["ggml.add_bos_token"] = numbers["bos"] is not None and ids[0] == numbers["bos"]
    settings["ggml.add_eos_token"] = numbers["eos"] is not None and ids[-1] == numbers["eos"]
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return settings | ({"chat_template": template} if template else {})


def _steps(component: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Take a normalizer or pre-tokenizer apart."""
    if component is None:
        return []
    return [dict(step) for step in (component[key] if component["type"] == "Sequence" else [component])]


def _pre_tokenizer(state: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which text is cut."""
    normalizers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    if normalizers not in ([], ["NFC"]) or not steps or steps[-1]["type"] != "ByteLevel":
        raise InexpressibleTokenizerError("it is neither byte-level BPE nor SentencePiece BPE")
    if steps[-1].get("add_prefix_space"):
        raise InexpressibleTokenizerError("it puts a space in front of text, which llama.cpp's byte-level BPE does not")
    skips = bool(state["model"].get("ignore_merges"))
    names = _names(steps)
    for name, skips_there in names:
        if skips_there == skips:
            return name
    if names and _merges_reach_all(state["model"]):
        return names[0][0]
    raise InexpressibleTokenizerError("it cuts text in a way that llama.cpp has no name for")


def _names(steps: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, bool]]:
    """Return llama.cpp's names for steps of which the last is byte-level."""
    *before, last = steps
    if last.get("use_regex", True):
        if not before:
            return (("gpt-2", False),)
        if len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"]:
            return (("smollm", False),)
        return ()
    if len(before) != 1 or before[0]["type"] != "Split":
        return ()
    split = before[0]
    if split["behavior"] not in ("Isolated", "Removed") or split["invert"] != (split["behavior"] == "Removed"):
        return ()
    return _SPLITS.get(split["pattern"].get("Regex", ""), ())


def _merges_reach_all(model: Mapping[str, Any]) -> bool:
    """Return whether merges alone make every token, so that words that are tokens need none of their own."""
    bpe = BPE(model["vocab"], _merges(model))
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"])


def _prepends_space(state: Mapping[str, Any]) -> bool:
    """Return whether SentencePiece's space is put in front of text."""
    normalizers = _steps(state["normalizer"], "normalizers")
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = {"type": "Prepend", "prepend": _SPACE}
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split"):
        return bool(steps[0]["prepend_scheme"] != "never")
    # Gemma cuts at spaces, of which none is left.
    if normalizers in ([prepends, replaces], [replaces]) and all(step["type"] == "Split" for step in steps):
        return normalizers[0] == prepends
    raise InexpressibleTokenizerError("it treats spaces otherwise than SentencePiece does in llama.cpp")


def _scores(state: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Return scores that order pieces as the merges do.

    From a SentencePiece model merges are made as all pairs of pieces that a piece consists of, the piece with the
    highest score first. Its score is then as good as its place.
    """
    missing = 256 - sum(1 for token in tokens if _BYTE_TOKEN.fullmatch(token))
    if missing:
        raise InexpressibleTokenizerError(f"it lacks tokens for {missing} bytes")
    places: dict[str, int] = {}
    previous = None
    for left, right in _merges(state["model"]):
        piece = left + right
        if piece != previous and piece in places:
            raise InexpressibleTokenizerError("its merges were not made from scores of pieces")
        places.setdefault(piece, len(places))
        previous = piece
    return [-float(places.get(token, len(places))) for token in tokens]
