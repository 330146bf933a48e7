"""A model without its weights, whose blocks are replaced by placeholders.

Running it records how the model calls its blocks and what the first one gets; handing the last placeholder an output
gives the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from omniquant_pl.families import BlockLayout, Family
from omniquant_pl.nn import ATTENTION, UnfusedExperts

__all__ = ["BlockCall", "Placeholder", "build_without_weights", "unfuse_experts"]


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one of its blocks, apart from the hidden states.

    Attributes:
        arguments: Positional arguments after the hidden states.
        options: Keyword arguments: rotary embeddings, mask, positions; their batch dimension is one.
    """

    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on hidden states ``[batch, tokens, channels]``; where it returns a tuple, the first is taken."""
        output = block(hidden, *self.arguments, **self.options)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


class Placeholder(nn.Module):
    """Stands in the place of a block: records its input and how it is called, returns what it is told to.

    Args:
        returns_tuple: Whether the model takes the first of what a block returns.

    Attributes:
        received: The last input ``[batch, tokens, channels]``.
        call: How the model called.
        output: What to return; ``None`` for the input.
    """

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.received: Tensor | None = None
        self.call = BlockCall()
        self.output: Tensor | None = None
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor | tuple[Tensor]:
        """Take a block's arguments."""
        self.received, self.call = hidden_states, BlockCall(arguments, options)
        output = hidden_states if self.output is None else self.output
        return (output,) if self._returns_tuple else output


def build_without_weights(config: PretrainedConfig, family: Family, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model on the meta device, but for what is computed and never stored (rotary frequencies).

    Args:
        config: The model's configuration.
        family: What its blocks look like, and what text does not reach.
        trust_remote_code: Whether code that comes with the checkpoint may run.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=family.attention or ATTENTION,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    for name in family.unread:
        model.set_submodule(name, nn.Identity())
    for module in model.modules():
        without_storage = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in without_storage:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
        if without_storage:
            model._init_weights(module)
    model.eval().requires_grad_(False)
    return model


def unfuse_experts(block: nn.Module, layout: BlockLayout) -> None:
    """Give each expert of a block linears of its own, in place; blocks without experts stay as they are."""
    experts = layout.experts
    if experts is not None:
        fused = block.get_submodule(experts.module)
        block.set_submodule(experts.module, UnfusedExperts(fused, (experts.gate, experts.up, experts.down)))
