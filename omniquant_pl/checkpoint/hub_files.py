"""Which files of a hub repository a run reads or keeps.

Patterns are those of ``fnmatch`` on whole paths, in which ``*`` crosses ``/``: a pattern for the top of a repository
would match in its folders too, where copies of the model in other formats are. So the folders are ignored by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CODE", "IGNORED", "LEGAL_FILES", "TEMPLATES", "TOKENIZER_FILES", "USED", "shards_of"]

TEMPLATES = "additional_chat_templates"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "tokenizer.model*",  # .v3: Mistral's
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""What transformers makes a tokenizer of, and code of the repository's own as a rule."""

LEGAL_FILES = ("LICENSE*", "LICENCE*", "License*", "license*", "NOTICE*", "Notice*", "USE_POLICY*")

USED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "*_preprocessor_config.json",
    *TOKENIZER_FILES,
    "README.md",
    *LEGAL_FILES,
)
"""Everything but weights and code."""

CODE = ("*.py",)


def _folders_but(name: str) -> Iterator[str]:
    """Patterns for what is in any folder but one, letter by letter: ``fnmatch`` knows no exceptions."""
    for end, letter in enumerate(name):
        yield f"{name[:end]}[!{letter}]*/*"
        if end:
            yield f"{name[:end]}/*"
    yield f"{name}[!/]*/*"


IGNORED = tuple(_folders_but(TEMPLATES))


def shards_of(index: Path) -> list[str]:
    """Return the files that an index of shards names, none if it is damaged: the reader of weights refuses it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(name for name in names if isinstance(name, str))
