"""Text from a prompt, written as it comes, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from typing_extensions import override

from omniquant_pl.errors import ConfigurationError

__all__ = ["Generation", "Sampling", "generate"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    max_new_tokens: int = 128
    """Tokens to generate at most; fewer where the model ends the text or has no positions left."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise what the logits are divided by before one is drawn."""
    top_k: int | None = None
    """Draw among so many of the likeliest tokens; null: among all."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability; null: among all."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError("max_new_tokens", f"{self.max_new_tokens} is not a positive number of tokens")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigurationError("temperature", f"{self.temperature} is not a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigurationError("top_k", f"{self.top_k} is not a positive number of tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigurationError("top_p", f"{self.top_p} is not a number above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigurationError("seed", f"{self.seed} is below 0, or has more than 64 bit")

    def config(self, own: GenerationConfig, new_tokens: int) -> GenerationConfig:
        """Return what transformers is told.

        Args:
            own: The model's: its tokens that end a text, and whatever else is not set here.
            new_tokens: Tokens to generate at most.
        """
        draws = self.temperature > 0
        ends = own.eos_token_id
        settings = {
            "max_new_tokens": new_tokens,
            "max_length": None,
            "do_sample": draws,
            "temperature": self.temperature if draws else None,
            "top_k": (self.top_k or 0) if draws else None,
            "top_p": (self.top_p or 1.0) if draws else None,
            "pad_token_id": own.pad_token_id if own.pad_token_id is not None else _first(ends),
            "use_cache": True,
        }
        return GenerationConfig.from_dict({**own.to_dict(), **settings})


def _first(ends: int | list[int] | None) -> int | None:
    return ends[0] if isinstance(ends, list) else ends


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        tokens: Ids of the new tokens.
        prompt_tokens: Number of tokens of the prompt.
        prefill_seconds: Until the first new token.
        decode_seconds: From the first new token to the last.
    """

    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first new one; ``None`` where that was the only one."""
        further = len(self.tokens) - 1
        return further / self.decode_seconds if further > 0 else None


class _Stream(TextStreamer):
    """Hands on text as soon as its words are complete, and notes when tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skips_prompt: bool, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=skips_prompt, skip_special_tokens=True)
        self._write = write
        self.times: list[float] = []

    @override
    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the prompt, then token by token
        super().put(value)  # type: ignore[no-untyped-call]

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling = Sampling(),
    chat: bool = False,
    write: Callable[[str], object] = lambda text: None,
) -> Generation:
    """Go on from a prompt.

    Args:
        model: A model that generates, as :func:`omniquant_pl.runtime.load_packed` returns it.
        tokenizer: Its tokenizer.
        prompt: What to go on from; with ``chat``, what the user says.
        sampling: How tokens are chosen.
        chat: Put the prompt into the tokenizer's chat template.
        write: Takes the text as it comes: the prompt and what follows, with ``chat`` the answer alone.

    Raises:
        ConfigurationError: If the prompt is empty, no text, too long for the model or has tokens without an embedding,
            or there is no chat template.
    """
    tokens = _encode(tokenizer, prompt, chat).to(model.device)
    _check_known(tokens, tokenizer, model)
    length = tokens.shape[1]
    positions = int(model.config.get_text_config().max_position_embeddings)
    if length >= positions:
        raise ConfigurationError("prompt", f"it has {length} tokens, and the model {positions} positions for all")
    config = sampling.config(model.generation_config, min(sampling.max_new_tokens, positions - length))
    stream = _Stream(tokenizer, chat, write)
    output = _run(model, tokens, config, stream, sampling.seed)
    started, first, *later = stream.times
    return Generation(output[0, length:].tolist(), length, first - started, (later or [first])[-1] - first)


def _run(model: PreTrainedModel, tokens: Tensor, config: GenerationConfig, stream: _Stream, seed: int) -> Tensor:
    """Return token ids ``[1, tokens]``, those given first; the generator of random numbers stays as it was."""
    run = cast(Callable[..., Tensor], model.generate)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return run(tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=stream)


def _check_known(tokens: Tensor, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse tokens that were added to the tokenizer alone."""
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    unknown = tokens[tokens >= rows]
    if unknown.numel():
        number = int(unknown[0])
        token = tokenizer.convert_ids_to_tokens(number)
        message = f"the token {token!r} (id {number}) has no embedding, the model has {rows}; leave it out"
        raise ConfigurationError("prompt", message)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Tensor:
    """Return token ids ``[1, tokens]``."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8, or half a surrogate pair
        message = f"character {error.start + 1} is {prompt[error.start]!r}, which is no text; write it as UTF-8"
        raise ConfigurationError("prompt", message) from error
    if not chat:
        encoded: Any = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        encoded = tokenizer.apply_chat_template(messages, **options)
    else:
        raise ConfigurationError("chat", "the tokenizer has no chat template; leave it out")
    tokens: Tensor = encoded["input_ids"]
    if tokens.numel() == 0:
        raise ConfigurationError("prompt", "it has no tokens; give the text to go on from")
    return tokens.long()
