"""A tokenizer of bytes, with and without a chat template."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, without a chat template."""
    tokens = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def tokenizer(bare_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One with a chat template that puts the role into angle brackets."""
    bare_tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    return bare_tokenizer
