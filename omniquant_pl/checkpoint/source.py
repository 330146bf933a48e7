"""The model to quantize, of which only the parts around the blocks are kept in memory.

A model's own transformers code runs unchanged. Around the blocks that is done with placeholders: the model is built
without storage, each block is replaced by a placeholder that records how the model calls it, and running the model
then gives the blocks' inputs; handing the last placeholder an output gives the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from omniquant_pl.arch import BlockLayout, family_of
from omniquant_pl.checkpoint.reader import Checkpoint
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.nn import ATTENTION, UnfusedExperts

__all__ = ["BlockCall", "SourceModel"]


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
        """Runs a block on hidden states ``[batch, tokens, channels]``; where it returns a tuple, the first is taken."""
        output = block(hidden, *self.arguments, **self.options)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


class _Placeholder(nn.Module):
    """Stands in the place of a block: records its input and how it is called, returns what it is told to."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.received: Tensor | None = None
        self.call = BlockCall()
        self.output: Tensor | None = None
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor | tuple[Tensor]:
        self.received, self.call = hidden_states, BlockCall(arguments, options)
        output = hidden_states if self.output is None else self.output
        return (output,) if self._returns_tuple else output


class SourceModel:
    """A checkpoint folder opened for calibration.

    Args:
        folder: A transformers model folder with safetensors weights.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        ConfigurationError: If the folder, its configuration or its weights cannot be used.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self._trust_remote_code = trust_remote_code
        self._whole_config = self._read_config()
        self.family = family_of(self._whole_config)
        self.config = self._whole_config.get_text_config()
        self.attention = self.family.shape(self.config)
        self.checkpoint = Checkpoint(folder)
        self._model = self._build()
        self._templates = cast(nn.ModuleList, self._model.get_submodule(self.family.blocks))
        self.layouts = [self.family.block(self.config, index) for index in range(len(self._templates))]
        for template, layout in zip(self._templates, self.layouts, strict=True):
            _unfuse_experts(template, layout)
        self._placeholders = [_Placeholder(self.family.returns_tuple) for _ in self._templates]
        self._model.set_submodule(self.family.blocks, nn.ModuleList(self._placeholders))
        self._load_surroundings()

    def _read_config(self) -> Any:
        if not (self.folder / "config.json").is_file():
            raise ConfigurationError("model.path", f"{self.folder} has no config.json; it is not a model folder")
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self._trust_remote_code)
        except (ValueError, OSError) as error:
            raise ConfigurationError("model.path", f"{self.folder / 'config.json'}: {error}") from error
        if getattr(config, "quantization_config", None):
            raise ConfigurationError("model.path", f"{self.folder} is quantized already; give the original checkpoint")
        return config

    def _build(self) -> PreTrainedModel:
        """Builds the model without storage, but for what is computed and never stored (rotary frequencies)."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self._whole_config,
                attn_implementation=self.family.attention or ATTENTION,
                dtype=torch.float32,
                trust_remote_code=self._trust_remote_code,
            )
        for name in self.family.unread:
            model.set_submodule(name, nn.Identity())
        for module in model.modules():
            without_storage = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in without_storage:
                setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
            if without_storage:
                model._init_weights(module)
        model.eval().requires_grad_(False)
        return model

    def _stored_name(self, name: str) -> str:
        """Name of a tensor in the checkpoint, which may have been saved without the language-model head around it."""
        stored = self.family.stored_name(name)
        without_prefix = stored.removeprefix(f"{self._model.base_model_prefix}.")
        return next((found for found in (stored, without_prefix, name) if found in self.checkpoint), stored)

    def _read(self, stored: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = self.checkpoint.read(tuple(stored.values()))
        return {name: tensors[stored_name].to(torch.float32) for name, stored_name in stored.items()}

    def _load_surroundings(self) -> None:
        tied = set(self._model.all_tied_weights_keys) if self._whole_config.tie_word_embeddings else set()
        names = [name for name in self._model.state_dict() if name not in tied]
        self._assign(self._model, self._read({name: self._stored_name(name) for name in names}))
        if tied:
            self._model.tie_weights()

    @staticmethod
    def _assign(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        expected = module.state_dict()
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
                raise ConfigurationError("model.path", f"{prefix}{name} has shape {shapes}")
        module.load_state_dict(dict(tensors), strict=False, assign=True)
        module.requires_grad_(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer, or ``None`` where it has none (token ids can still be given)."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self._trust_remote_code)
        except (ValueError, OSError, KeyError):
            return None
        return cast(PreTrainedTokenizerBase, tokenizer)

    @property
    def positions(self) -> int:
        """Longest sequence that the model was made for."""
        return int(self.config.max_position_embeddings)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._placeholders)

    def block_prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with in the model."""
        return f"{self.family.blocks}.{index}."

    def verify(self) -> None:
        """Looks at every tensor once, before any work.

        Raises:
            ConfigurationError: If one is missing, has another shape, or a value that is not finite.
        """
        for index in range(len(self)):
            shapes = self.block_shapes(index)
            for name, stored in self.stored_names(index).items():
                found = self.checkpoint.describe(stored)
                if found.shape != shapes[name]:
                    raise ConfigurationError("model.path", f"{stored} has shape {found.shape}, not {shapes[name]}")
                if not found.is_float:
                    message = f"{stored} is stored as {found.dtype}; give the original checkpoint, in 16 bit or more"
                    raise ConfigurationError("model.path", message)
        self.checkpoint.verify()

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one block's tensors by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._templates[index].state_dict().items()}

    def stored_names(self, index: int) -> dict[str, str]:
        """Names of one block's tensors in the checkpoint, by their names inside the block."""
        prefix = self.block_prefix(index)
        return {name: self._stored_name(prefix + name) for name in self._templates[index].state_dict()}

    @property
    def surrounding_names(self) -> tuple[str, ...]:
        """Names of all stored tensors that are not in a block, sorted."""
        inside = {name for index in range(len(self)) for name in self.stored_names(index).values()}
        return tuple(name for name in self.checkpoint.names() if name not in inside)

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Reads one block's tensors in float32, by their names inside the block."""
        return self._read(self.stored_names(index))

    def make_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Returns a block of the model's own class that holds these tensors (without copying them)."""
        block = copy.deepcopy(self._templates[index])
        self._assign(block, tensors, self.block_prefix(index))
        return block.eval()

    def to(self, device: torch.device) -> None:
        """Moves what surrounds the blocks."""
        nn.Module.to(self._model, device)

    @property
    def device(self) -> torch.device:
        """Where the parts around the blocks are."""
        return self._model.device

    @torch.no_grad()
    def calls(self, length: int) -> list[BlockCall]:
        """Returns how each block is called for sequences of that many tokens."""
        self._model(torch.zeros(1, length, dtype=torch.long, device=self.device), use_cache=False)
        return [placeholder.call for placeholder in self._placeholders]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the first block's input for token ids ``[batch, tokens]``, ``[batch, tokens, channels]``."""
        self._model.base_model(tokens.to(self.device), use_cache=False)
        received = self._placeholders[0].received
        assert received is not None
        return received

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[batch, tokens, vocabulary]`` for the last block's output."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        self._placeholders[-1].output = hidden
        try:
            return cast(Tensor, self._model(tokens, use_cache=False).logits)
        finally:
            self._placeholders[-1].output = None


def _unfuse_experts(block: nn.Module, layout: BlockLayout) -> None:
    experts = layout.experts
    if experts is not None:
        fused = block.get_submodule(experts.module)
        block.set_submodule(experts.module, UnfusedExperts(fused, (experts.gate, experts.up, experts.down)))
