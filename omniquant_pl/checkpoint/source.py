"""The model to quantize, of which only the parts around the blocks are kept in memory.

A model's own transformers code runs unchanged. Around the blocks that is done with placeholders: the model is built
without storage, each block is replaced by a placeholder that records how the model calls it, and running the model
then gives the blocks' inputs; handing the last placeholder an output gives the logits.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omniquant_pl.checkpoint.config import open_config
from omniquant_pl.checkpoint.reader import Checkpoint, TensorInfo
from omniquant_pl.checkpoint.rotation import Rotation
from omniquant_pl.checkpoint.skeleton import BlockCall, Placeholder, build_without_weights, unfuse_experts
from omniquant_pl.checkpoint.tokenizer import FoundTokenizer, open_tokenizer
from omniquant_pl.checkpoint.tying import absent_tensors, tie
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import family_of, unfused_experts
from omniquant_pl.spec import RotationSpec

__all__ = ["SourceModel"]

_log = logging.getLogger(__name__)


class SourceModel:
    """A checkpoint folder opened for calibration.

    Args:
        folder: A transformers model folder with safetensors weights.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        rotation: Makes this the model with rotations folded into its weights; ``None`` for the model as it is stored.

    Attributes:
        rotation: What is folded into the weights.
        config_json: What ``config.json`` says; of the family that the checkpoint is opened as, if that is another.
        checkpoint: The tensors under the names of published checkpoints of that family.
        is_tied: Whether the head's weight is the embedding's.

    Raises:
        ConfigurationError: If the folder, its configuration or its weights cannot be used.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False, rotation: RotationSpec | None = None) -> None:
        self.folder = folder
        self.rotation = rotation
        self._trust_remote_code = trust_remote_code
        opened = open_config(folder, trust_remote_code)
        self.config_json = dict(opened.content)
        with opened.blamed():
            self.family = family_of(opened.whole)
        self.config = opened.whole.get_text_config()
        weights = self.config_json.pop("transformers_weights", None)
        self.checkpoint = opened.converted or Checkpoint(folder, weights=weights)
        with opened.blamed(Exception):
            self._model = build_without_weights(opened.whole, self.family, trust_remote_code)
        with opened.blamed():
            self._templates = cast(nn.ModuleList, self._model.get_submodule(self.family.blocks))
            self.attention = self.family.shape(self.config)
            self.layouts = [self.family.block(self.config, index) for index in range(len(self._templates))]
            self._check_not_empty()
        for template, layout in zip(self._templates, self.layouts, strict=True):
            unfuse_experts(template, layout)
        self._find_experts()
        self._placeholders = [Placeholder(self.family.returns_tuple) for _ in self._templates]
        self._model.set_submodule(self.family.blocks, nn.ModuleList(self._placeholders))
        self._rotation = None if rotation is None else self._make_rotation(rotation)
        self._untied: dict[str, str] = {}
        self._load_non_block_tensors()
        with opened.blamed(Exception):
            self.calls(1)  # what builds may still not run

    def _find_experts(self) -> None:
        """Look for experts where the checkpoint has them: one by one, or in 3-D tensors."""
        experts = next((layout.experts for layout in self.layouts if layout.experts is not None), None)
        if experts is not None:
            tensors = unfused_experts(self.checkpoint.shapes(), experts, self.family.stored_name)
            if tensors:
                self.checkpoint = self.checkpoint.view(tensors)

    def _stored_name(self, name: str) -> str:
        """Return the name of a tensor in the checkpoint, which may lack the prefix of a model without its head."""
        stored = self.family.stored_name(name)
        without_prefix = stored.removeprefix(f"{self._model.base_model_prefix}.")
        return next((found for found in (stored, without_prefix, name) if found in self.checkpoint), stored)

    def _check_not_empty(self) -> None:
        """Refuse a model of no blocks, positions or heads, which builds all the same."""
        if not self._templates:
            raise ValueError("num_hidden_layers is not above 0")
        if self.positions < 1:
            raise ValueError(f"max_position_embeddings is {self.positions}, not above 0")
        if min(self.attention.heads, self.attention.kv_heads, self.attention.head_dim) < 1:
            raise ValueError(f"its attention has no heads: {self.attention}")

    def _read(self, stored: Mapping[str, str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read tensors in float32, of what the model itself has as integers in the dtype it is stored in.

        Args:
            stored: Their names in the checkpoint, by their names in the model.
            expected: The model's own by name, of which shape and dtype count.
        """
        self._check_alike(stored, expected)
        tensors = self.checkpoint.read(tuple(stored.values()))
        return {
            name: tensors[stored_name].to(torch.float32) if expected[name].is_floating_point() else tensors[stored_name]
            for name, stored_name in stored.items()
        }

    def _check_alike(self, stored: Mapping[str, str], expected: Mapping[str, Tensor]) -> None:
        """Refuse tensors of other shapes than the model's, and codes in the place of weights."""
        for name, stored_name in stored.items():
            found, shape = self.checkpoint.describe(stored_name).shape, tuple(expected[name].shape)
            if found != shape:
                where = f"{self.checkpoint.path_of(stored_name)}: {stored_name}"
                raise ConfigurationError("model.path", f"{where} has shape {found}, not {shape}")
            if expected[name].is_floating_point():
                self._check_codes(stored_name)

    def _check_codes(self, name: str) -> None:
        """Refuse a tensor of numbers that mean nothing without their scales: no floats of 16 bit or more."""
        found = self.checkpoint.describe(name)
        if not found.is_float:
            message = f"{name} is stored as {found.dtype}; give the original checkpoint, in 16 bit or more"
            raise ConfigurationError("model.path", f"{self.checkpoint.path_of(name)}: {message}")

    def _make_rotation(self, spec: RotationSpec) -> Rotation:
        blocks = [(layout, self.block_shapes(index)) for index, layout in enumerate(self.layouts)]
        return Rotation(spec, self.family, blocks, self.attention, self.config.hidden_size)

    def _load_non_block_tensors(self) -> None:
        expected = self._model.state_dict()
        absent = absent_tensors(self._model, lambda name: self._stored_name(name) in self.checkpoint)
        tensors = self._read({name: self._stored_name(name) for name in expected if name not in absent}, expected)
        self._assign(self._model, tensors)
        tied = self._tie(absent)
        if self._rotation is not None and self._rotation.turns_residual:
            rotated = self._rotation.non_block_tensors(self._embedding_name(), self._model.state_dict())
            self._assign(self._model, rotated)
            self._untie(tied)
            tied = {}
        self.is_tied = bool(tied)

    def _tie(self, absent: set[str]) -> dict[str, str]:
        """Tie what is one, and have configuration and names say so; return tied tensors with what they are."""
        proposed = dict(self._model.all_tied_weights_keys)
        tied = tie(self._model, absent)
        for name in proposed.keys() - tied.keys():
            self.config_json = self.config_json | {"tie_word_embeddings": False}
            message = "%s: tie_word_embeddings is true, but %s differs from %s; both are used as they are stored"
            _log.warning(message, self.folder, self._stored_name(name), self._stored_name(proposed[name]))
        alone = {self._stored_name(name): self._stored_name(owner) for name, owner in tied.items() if owner in absent}
        self.checkpoint = self.checkpoint.renamed(alone)
        return tied

    def _embedding_name(self) -> str:
        embedding = self._model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self._model.named_modules() if module is embedding)

    def _untie(self, tied: Mapping[str, str]) -> None:
        """Give tensors that were the same as others places of their own."""
        if tied:
            self._untied = {self._stored_name(name): self._stored_name(owner) for name, owner in tied.items()}
            self.config_json = self.config_json | {"tie_word_embeddings": False}

    @staticmethod
    def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        module.load_state_dict(dict(tensors), strict=False, assign=True)
        module.requires_grad_(False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer, or ``None`` where it has none that opens (token ids can still be given)."""
        return self.found_tokenizer.tokenizer

    @cached_property
    def found_tokenizer(self) -> FoundTokenizer:
        """The folder's tokenizer, or why there is none."""
        return open_tokenizer(self.folder, self._trust_remote_code)

    @property
    def positions(self) -> int:
        """Longest sequence that the model was made for."""
        return int(self.config.max_position_embeddings)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._placeholders)

    def block_prefix(self, index: int) -> str:
        """Return what the names of a block's tensors begin with in the model."""
        return f"{self.family.blocks}.{index}."

    def verify(self) -> None:
        """Look at every tensor once, before any work.

        Raises:
            ConfigurationError: If one is missing, has another shape or dtype, or a value that is not finite.
        """
        for index, template in enumerate(self._templates):
            self._check_alike(self.stored_names(index), template.state_dict())
        for name in self.checkpoint.names():  # those that calibration does not read as well: they are exported
            if name.endswith((".weight", ".bias")):
                self._check_codes(name)
        self.checkpoint.verify()

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one block's tensors by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._templates[index].state_dict().items()}

    def stored_names(self, index: int) -> dict[str, str]:
        """Return the names of one block's tensors in the checkpoint, by their names inside the block."""
        prefix = self.block_prefix(index)
        return {name: self._stored_name(prefix + name) for name in self._templates[index].state_dict()}

    @property
    def non_block_names(self) -> tuple[str, ...]:
        """Names in checkpoints of all tensors that are not in a block, sorted."""
        inside = {name for index in range(len(self)) for name in self.stored_names(index).values()}
        return tuple(sorted({*self.checkpoint.names(), *self._untied} - inside))

    def describe(self, name: str) -> TensorInfo:
        """Return shape and stored dtype of a tensor by its name in checkpoints."""
        return self.checkpoint.describe(self._untied.get(name, name))

    def non_block_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield :attr:`non_block_names` with their tensors: those of the model, and others as they are stored."""
        loaded = {self._stored_name(name): tensor for name, tensor in self._model.state_dict().items()}
        for name in self.non_block_names:
            yield name, loaded[name] if name in loaded else self.checkpoint.read((name,))[name]

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Return one block's tensors in float32, by their names inside the block."""
        tensors = self._read(self.stored_names(index), self._templates[index].state_dict())
        return tensors if self._rotation is None else self._rotation.block(self.layouts[index], tensors)

    def make_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return a block of the model's own class that holds these tensors (without copying them)."""
        block = copy.deepcopy(self._templates[index])
        self._assign(block, tensors)
        return block.eval()

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Move what surrounds the blocks, to compute in a dtype."""
        nn.Module.to(self._model, device, dtype)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Move what surrounds the blocks to a device for a while: it is large, and seldom needed there."""
        before = self.device
        self.to(device)
        try:
            yield
        finally:
            self.to(before)

    @property
    def device(self) -> torch.device:
        """Where the parts around the blocks are."""
        return self._model.device

    @torch.no_grad()
    def calls(self, length: int) -> list[BlockCall]:
        """Return how each block is called for sequences of that many tokens."""
        self._model(torch.zeros(1, length, dtype=torch.long, device=self.device), use_cache=False)
        return [placeholder.call for placeholder in self._placeholders]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the first block's input for token ids ``[batch, tokens]``, ``[batch, tokens, channels]``."""
        self._model.base_model(tokens.to(self.device), use_cache=False)
        received = self._placeholders[0].received
        assert received is not None
        return received

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[batch, tokens, vocabulary]`` for the last block's output, differentiable in it."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        self._placeholders[-1].output = hidden
        try:
            return cast(Tensor, self._model(tokens, use_cache=False).logits)
        finally:
            self._placeholders[-1].output = None
