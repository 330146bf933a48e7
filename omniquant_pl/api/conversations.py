"""Conversations as token ids, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.data.decoding import whole_text
from omniquant_pl.errors import ConfigurationError

__all__ = ["conversation_ids", "is_message"]

_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Roles of the ShareGPT form, whose messages have ``from`` and ``value``."""


def is_message(value: object) -> bool:
    """Return whether a value is a message: ``role`` and ``content``, or ``from`` and ``value``."""
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def conversation_ids(messages: Sequence[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Render a conversation by the chat template.

    Args:
        messages: Its messages.
        where: Its place, for errors.
        tokenizer: The model's tokenizer.

    Returns:
        Token ids, int64 [tokens].

    Raises:
        ConfigurationError: If there is no tokenizer, it has no chat template, or the template refuses the messages.
    """
    if tokenizer is None:
        raise _refused(f"{where} is a conversation, which needs a tokenizer; give one, or token ids")
    if not tokenizer.chat_template:
        message = f"{where} is a conversation, and the tokenizer has no chat template; set tokenizer.chat_template"
        raise _refused(f"{message}, or give texts")
    checked = [_message(each, f"{where} message {index}") for index, each in enumerate(messages)]
    try:
        ids = tokenizer.apply_chat_template(checked, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise _refused(f"{where} does not fit the tokenizer's chat template: {reason}") from error
    if not ids:
        raise _refused(f"{where} is empty by the tokenizer's chat template; leave it out")
    return torch.tensor(ids, dtype=torch.int64)


def _message(value: object, where: str) -> dict[str, Any]:
    """Return a message in the form of chat templates, its text checked."""
    if not is_message(value):
        found = "None" if value is None else f"a {type(value).__name__}"
        columns = f" with {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
        raise _refused(f"{where} is {found}{columns}; messages are mappings with role and content")
    assert isinstance(value, Mapping)
    message = dict(value)
    if "role" not in message:
        message = {"role": _SPEAKERS.get(value["from"], value["from"]), "content": value["value"]}
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise _refused(f"{where} has no content")
    if isinstance(content, str):
        try:
            message["content"] = whole_text(content)
        except ValueError as error:
            raise _refused(f"{where} has {error}") from error
    return message


def _refused(message: str) -> ConfigurationError:
    return ConfigurationError("calibration", message)
