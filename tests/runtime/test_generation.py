"""Text from a prompt: as transformers generates it, written as it comes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.runtime import Generation, Sampling, generate, generation_table, memory_line

WORDS = ["<end>", *(f"word{index}" for index in range(1, 64))]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word is one token, and the first ends a text."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


@pytest.fixture(scope="session")
def model(make_llama: Callable[..., Path]) -> PreTrainedModel:
    folder = make_llama(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(model: PreTrainedModel, tokenizer: Any, prompt: str = "word5 word6", chat: bool = False, **options: Any) -> Any:
    """What was generated, and the pieces of text that were written."""
    pieces: list[str] = []
    settings = {"max_new_tokens": 12} | options
    return generate(model, tokenizer, prompt, Sampling(**settings), chat, pieces.append), pieces


@torch.no_grad()
def likeliest(model: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    """Greedy search without a cache."""
    for _ in range(count):
        tokens = [*tokens, int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())]
    return tokens[-count:]


def test_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    generation, pieces = run(model, tokenizer)
    assert generation.tokens == likeliest(model, [5, 6], 12)
    assert generation.prompt_tokens == 2
    assert "".join(pieces) == " ".join(WORDS[token] for token in [5, 6, *generation.tokens])


def test_text_comes_piece_by_piece(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[int] = []
    pieces: list[str] = []
    forward = model.forward

    def count(*arguments: Any, **options: Any) -> Any:
        seen.append(len("".join(pieces).split()))
        return forward(*arguments, **options)

    model.forward = count
    try:
        generate(model, tokenizer, "word5 word6", Sampling(6), write=pieces.append)
    finally:
        model.forward = forward
    assert seen == [1, 2, 3, 4, 5, 6]  # the last word may still grow


def test_draws_repeat_with_their_seed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    first, again, other = (run(model, tokenizer, temperature=1.0, seed=seed)[0].tokens for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    probabilities = (logits / 0.7).softmax(0)
    for seed in range(20):
        expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
        generation, _ = run(model, tokenizer, max_new_tokens=1, temperature=0.7, seed=seed)
        assert generation.tokens == expected.tolist()


def test_one_candidate_is_the_likeliest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = likeliest(model, [5, 6], 12)
    assert run(model, tokenizer, temperature=5.0, top_k=1)[0].tokens == expected
    assert run(model, tokenizer, temperature=1.0, top_p=1e-6)[0].tokens == expected
    assert run(model, tokenizer, temperature=5.0)[0].tokens != expected


def test_the_model_ends_the_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = likeliest(model, [5, 6], 12)
    end = tokens[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    assert run(model, tokenizer)[0].tokens == tokens[: tokens.index(end) + 1]


def test_positions_are_not_left(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model has 32 of them."""
    generation, _ = run(model, tokenizer, prompt=" ".join(WORDS[1:29]), max_new_tokens=100)
    assert len(generation.tokens) == 32 - 28
    with pytest.raises(ConfigurationError, match="prompt: it has 32 tokens, and the model 32 positions"):
        run(model, tokenizer, prompt=" ".join(WORDS[1:33]))


def test_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="chat: the tokenizer has no chat template"):
        run(model, tokenizer, chat=True)
    template = "{% for message in messages %}word1 {{ message.content }} {% endfor %}word2"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    generation, pieces = run(model, tokenizer, chat=True)
    assert generation.prompt_tokens == 4
    assert generation.tokens == likeliest(model, [1, 5, 6, 2], 12)
    assert "".join(pieces) == " ".join(WORDS[token] for token in generation.tokens)


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_without_an_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """The model has 64 rows; without a chat the added token is in the prompt, with one in the template."""
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<tool>", "<other>"])
    monkeypatch.setattr(added, "chat_template", "{{ messages[0].content }} <other>")
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("it was generated"))
    token, number = ("<other>", 65) if chat else ("<tool>", 64)
    with pytest.raises(ConfigurationError, match=rf"^prompt: the token '{token}' \(id {number}\) .* has 64;"):
        run(model, added, prompt="word5" if chat else "word5 <tool> word6", chat=chat)


@pytest.mark.parametrize("prompt", ["word5 \ud83d", "\udcff word5"])
@pytest.mark.parametrize("chat", [False, True])
def test_prompt_that_is_no_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, chat: bool
) -> None:
    with pytest.raises(ConfigurationError, match=r"^prompt: character \d is '.u.*', which is no text; .* UTF-8"):
        run(model, tokenizer, prompt=prompt, chat=chat)


def test_prompt_without_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigurationError, match="prompt: it has no tokens"):
        run(model, tokenizer, prompt=" ")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"^{option}: "):
        Sampling(**{option: value})  # type: ignore[arg-type]


def test_speeds() -> None:
    assert Generation([1, 2, 3], 8, 0.5, 0.25).prefill_rate == 16
    assert Generation([1, 2, 3], 8, 0.5, 0.25).decode_rate == 8
    assert Generation([1], 8, 0.5, 0.0).decode_rate is None


def test_report(model: PreTrainedModel) -> None:
    table = generation_table(Generation([1, 2, 3], 8, 0.5, 0.25))
    assert [list(column.cells) for column in table.columns] == [["prompt", "generated"], ["8", "3"], ["16.0", "8.0"]]
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert re.fullmatch(rf"weights {size / 1000:.1f} kB; peak memory: host [\d.]+ [MG]B", memory_line(model))
