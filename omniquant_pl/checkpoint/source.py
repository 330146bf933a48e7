"""The model to quantize, of which only the parts around the blocks are kept in memory.

A model's own transformers code runs unchanged. Around the blocks that is done with placeholders: the model is built
without storage, each block is replaced by a placeholder that records how the model calls it, and running the model
then gives the blocks' inputs; handing the last placeholder an output gives the logits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from omniquant_pl.arch import conversion_of, family_of, unfused_experts
from omniquant_pl.checkpoint.pointers import refuse_pointer
from omniquant_pl.checkpoint.reader import Checkpoint, TensorInfo
from omniquant_pl.checkpoint.rotation import Rotation
from omniquant_pl.checkpoint.skeleton import BlockCall, Placeholder, build_without_weights, unfuse_experts
from omniquant_pl.checkpoint.tokenizer import FoundTokenizer, open_tokenizer
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.spec import RotationSpec

__all__ = ["SourceModel"]


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

    Raises:
        ConfigurationError: If the folder, its configuration or its weights cannot be used.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False, rotation: RotationSpec | None = None) -> None:
        self.folder = folder
        self.rotation = rotation
        self._trust_remote_code = trust_remote_code
        self.config_json = self._read_json()
        converted = self._convert()
        self._whole_config = self._read_config(converted is not None)
        self.family = family_of(self._whole_config)
        self.config = self._whole_config.get_text_config()
        self.attention = self.family.shape(self.config)
        self.checkpoint = Checkpoint(folder) if converted is None else converted
        self._model = build_without_weights(self._whole_config, self.family, trust_remote_code)
        self._templates = cast(nn.ModuleList, self._model.get_submodule(self.family.blocks))
        self.layouts = [self.family.block(self.config, index) for index in range(len(self._templates))]
        for template, layout in zip(self._templates, self.layouts, strict=True):
            unfuse_experts(template, layout)
        self._find_experts()
        self._placeholders = [Placeholder(self.family.returns_tuple) for _ in self._templates]
        self._model.set_submodule(self.family.blocks, nn.ModuleList(self._placeholders))
        self._rotation = None if rotation is None else self._make_rotation(rotation)
        self._untied: dict[str, str] = {}
        self._load_surroundings()

    def _read_json(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise ConfigurationError("model.path", f"{self.folder} has no config.json; it is not a model folder")
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            refuse_pointer(path, "model.path")
            raise ConfigurationError("model.path", f"{path}: {error}") from error

    def _convert(self) -> Checkpoint | None:
        """Sees a checkpoint that is opened as another family's as one of that family, from here on."""
        convert = conversion_of(self.config_json.get("model_type", ""))
        if convert is None:
            return None
        checkpoint = Checkpoint(self.folder)
        self.config_json, tensors = convert(self.config_json, checkpoint.shapes())
        return checkpoint.view(tensors)

    def _read_config(self, is_converted: bool) -> PretrainedConfig:
        config: PretrainedConfig
        try:
            if is_converted:
                config = AutoConfig.for_model(**self.config_json)
            else:
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self._trust_remote_code)
        except (ValueError, OSError) as error:
            raise ConfigurationError("model.path", f"{self.folder / 'config.json'}: {error}") from error
        if getattr(config, "quantization_config", None):
            raise ConfigurationError("model.path", f"{self.folder} is quantized already; give the original checkpoint")
        return config

    def _find_experts(self) -> None:
        """Looks for experts where the checkpoint has them: one by one, or in 3-D tensors."""
        experts = next((layout.experts for layout in self.layouts if layout.experts is not None), None)
        if experts is not None:
            tensors = unfused_experts(self.checkpoint.shapes(), experts, self.family.stored_name)
            if tensors:
                self.checkpoint = self.checkpoint.view(tensors)

    def _stored_name(self, name: str) -> str:
        """Name of a tensor in the checkpoint, which may have been saved without the language-model head around it."""
        stored = self.family.stored_name(name)
        without_prefix = stored.removeprefix(f"{self._model.base_model_prefix}.")
        return next((found for found in (stored, without_prefix, name) if found in self.checkpoint), stored)

    def _read(self, stored: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = self.checkpoint.read(tuple(stored.values()))
        return {name: tensors[stored_name].to(torch.float32) for name, stored_name in stored.items()}

    def _make_rotation(self, spec: RotationSpec) -> Rotation:
        blocks = [(layout, self.block_shapes(index)) for index, layout in enumerate(self.layouts)]
        return Rotation(spec, self.family, blocks, self.attention, self.config.hidden_size)

    def _load_surroundings(self) -> None:
        tied = dict(self._model.all_tied_weights_keys) if self._whole_config.tie_word_embeddings else {}
        names = [name for name in self._model.state_dict() if name not in tied]
        tensors = self._read({name: self._stored_name(name) for name in names})
        self._refuse_shapes(self._model, tensors)
        if self._rotation is not None and self._rotation.turns_residual:
            tensors |= {name: tensors[owner] for name, owner in tied.items()}
            tensors = self._rotation.surroundings(self._embedding_name(), tensors)
            self._untie(tied)
            tied = {}
        self._assign(self._model, tensors)
        if tied:
            self._model.tie_weights()

    def _embedding_name(self) -> str:
        embedding = self._model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self._model.named_modules() if module is embedding)

    def _untie(self, tied: Mapping[str, str]) -> None:
        """Gives tensors that were the same as others places of their own."""
        if tied:
            self._untied = {self._stored_name(name): self._stored_name(owner) for name, owner in tied.items()}
            self.config_json = self.config_json | {"tie_word_embeddings": False}

    @staticmethod
    def _refuse_shapes(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        expected = module.state_dict()
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
                raise ConfigurationError("model.path", f"{prefix}{name} has shape {shapes}")

    @classmethod
    def _assign(cls, module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        cls._refuse_shapes(module, tensors, prefix)
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
        """Names in checkpoints of all tensors that are not in a block, sorted."""
        inside = {name for index in range(len(self)) for name in self.stored_names(index).values()}
        return tuple(sorted({*self.checkpoint.names(), *self._untied} - inside))

    def describe(self, name: str) -> TensorInfo:
        """Returns shape and stored dtype of a tensor by its name in checkpoints."""
        return self.checkpoint.describe(self._untied.get(name, name))

    def surroundings(self) -> Iterator[tuple[str, Tensor]]:
        """Yields :attr:`surrounding_names` with their tensors: those of the model, and others as they are stored."""
        loaded = {self._stored_name(name): tensor for name, tensor in self._model.state_dict().items()}
        for name in self.surrounding_names:
            yield name, loaded[name] if name in loaded else self.checkpoint.read((name,))[name]

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Returns one block's tensors in float32, by their names inside the block."""
        tensors = self._read(self.stored_names(index))
        return tensors if self._rotation is None else self._rotation.block(self.layouts[index], tensors)

    def make_block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Returns a block of the model's own class that holds these tensors (without copying them)."""
        block = copy.deepcopy(self._templates[index])
        self._assign(block, tensors, self.block_prefix(index))
        return block.eval()

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Moves what surrounds the blocks, to compute in a dtype."""
        nn.Module.to(self._model, device, dtype)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Moves what surrounds the blocks to a device for a while: it is large, and seldom needed there."""
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[batch, tokens, vocabulary]`` for the last block's output, differentiable in it."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        self._placeholders[-1].output = hidden
        try:
            return cast(Tensor, self._model(tokens, use_cache=False).logits)
        finally:
            self._placeholders[-1].output = None
