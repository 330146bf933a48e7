"""Turns texts into tokens with llama.cpp, and back; runs in the programs' own environment.

    python gguf_tokenizer_worker.py [FILE TEXTS IDS]...

TEXTS and IDS are JSON files: a list of texts, and their token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def tokenize(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of texts; special tokens in them are recognised, and those that the file asks for are added."""
    from llama_cpp import Llama

    model = Llama(str(file), n_gpu_layers=0, vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def main(*jobs: str) -> None:
    """Works on triples of a model, texts and ids."""
    for file, texts, ids in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        Path(ids).write_text(json.dumps(tokenize(Path(file), json.loads(Path(texts).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
