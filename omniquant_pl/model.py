"""The whole model's quantization: the ``model:`` section of a configuration, and the blocks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.checkpoint import BlockCall, SourceModel, locate_model
from omniquant_pl.errors import ConfigurationError, unmasked
from omniquant_pl.initialization.initializer import Initializer
from omniquant_pl.nn import prepare_block
from omniquant_pl.quant import ChannelRange
from omniquant_pl.spec import (
    ActivationSpec,
    BudgetSpec,
    ClippingSpec,
    FactorRates,
    LearningSpec,
    ObjectiveSpec,
    RotationSpec,
    RoundingSpec,
    Scheme,
    TransformSpec,
    WeightSpec,
)

__all__ = ["OmniQuantModel"]

_NOT_FINGERPRINTED = ("self", "__class__", "path", "activation_budget", "trust_remote_code")


class OmniQuantModel(LightningModule):
    """What to quantize and how.

    It has no parameters itself; every block becomes a :class:`QuantizedBlock`.

    Args:
        path: Name of an embedded checkpoint (tiny-llama), a local model folder, or a hub id owner/name.
        weights: Quantization of the weights.
        activations: Quantization of linear and attention inputs; null leaves them in 16 bit.
        clipping: Learnable weight clipping; null turns it off.
        transform: Learnable equivalent transformation; null turns it off.
        rotation: Hadamard rotations folded into the weights before anything is learned; null turns them off.
        rounding: Which codes weights get.
        objective: What a block minimises.
        learning: How factors learn: schedule, weight decay, compiled steps.
        activation_dtype: What the hidden states between blocks are stored in; null: bfloat16 if the checkpoint is, else
            float32.
        activation_budget: Memory that they may take; results do not depend on it.
        parameters: Run folder, factors.safetensors of an export, or omni_parameters.pth of the original implementation,
            whose learned factors are the starting point; null starts from the calibration set.
        trust_remote_code: Let Python code that comes with the checkpoint run.

    Attributes:
        settings: What decides, besides the checkpoint, what a calibration learns: arguments by their names.
    """

    def __init__(
        self,
        path: str = "tiny-llama",
        weights: WeightSpec = WeightSpec(),  # noqa: B008 (frozen)
        activations: ActivationSpec | None = None,
        clipping: ClippingSpec | None = ClippingSpec(),  # noqa: B008 (frozen)
        transform: TransformSpec | None = None,
        rotation: RotationSpec | None = None,
        rounding: RoundingSpec = RoundingSpec(),  # noqa: B008 (frozen)
        objective: ObjectiveSpec = ObjectiveSpec(),  # noqa: B008 (frozen)
        learning: LearningSpec = LearningSpec(),  # noqa: B008 (frozen)
        activation_dtype: Literal["float32", "bfloat16"] | None = None,
        activation_budget: BudgetSpec = BudgetSpec(),  # noqa: B008 (frozen)
        parameters: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self.settings = {name: value for name, value in given.items() if name not in _NOT_FINGERPRINTED}
        self.path = path
        self.scheme = Scheme(weights, activations)
        self.clipping = clipping
        self.transform = transform
        self.rotation = rotation
        self.rounding = rounding
        self.objective = objective
        self.learning = learning
        self._activation_dtype = activation_dtype
        self.activation_budget = activation_budget
        self._start_from = parameters
        self.trust_remote_code = trust_remote_code

    @property
    @unmasked
    def rates(self) -> FactorRates:
        """Learning rates of the factors; 0 of a kind that is turned off."""
        return FactorRates(
            clipping=0.0 if self.clipping is None else self.clipping.lr,
            transform=0.0 if self.transform is None else self.transform.lr,
            rounding=self.rounding.lr,
            learning=self.learning,
        )

    @cached_property
    @unmasked
    def source(self) -> SourceModel:
        """The checkpoint, opened at first use, and rotated if the model is to be.

        Raises:
            ConfigurationError: If it cannot be used.
        """
        return SourceModel(locate_model(self.path, self.trust_remote_code), self.trust_remote_code, self.rotation)

    @property
    @unmasked
    def activation_dtype(self) -> torch.dtype:
        """What the hidden states between blocks are stored in."""
        weight = self.source.stored_names(0)[f"{self.source.layouts[0].linears[0]}.weight"]
        return self.activation_dtype_for(self.source.describe(weight).dtype == "BF16")

    def activation_dtype_for(self, is_bfloat16: bool) -> torch.dtype:
        """Return the same, for a checkpoint of which no more is known than whether it is stored in bfloat16."""
        if self._activation_dtype is not None:
            dtype: torch.dtype = getattr(torch, self._activation_dtype)
            return dtype
        return torch.bfloat16 if is_bfloat16 else torch.float32

    def unrotated(self) -> SourceModel:
        """Return the checkpoint as it is stored, opened once more if :attr:`source` is a rotated one."""
        if self.rotation is None:
            return self.source
        return SourceModel(locate_model(self.path, self.trust_remote_code), self.trust_remote_code)

    @cached_property
    @unmasked
    def start(self) -> Initializer:
        """Where the factors start.

        Raises:
            ConfigurationError: If a file or folder that they start from cannot be used.
        """
        return Initializer(self.source, self._start_from, self.clipping, self.transform, self.scheme.activations)

    def verify(self) -> None:
        """Open and read everything once.

        Raises:
            ConfigurationError: If the model or the factors to start from cannot be used.
        """
        self.source.verify()
        kinds = {name.rpartition(".")[2] for layout in self.source.layouts for name in layout.linears}
        for kind in self.scheme.weights.bits_of:
            if kind not in kinds:
                known = ", ".join(sorted(kinds))
                raise ConfigurationError(f"model.weights.bits_of.{kind}", f"this model's linears are: {known}")
        for index in range(len(self.source)) if self.start.needs_no_calibration else ():
            tensors = self.source.block_tensors(index)
            self.start.set(index, self._factors(index, tensors, learned=True), tensors, {}, {})

    @property
    @unmasked
    def quantized_weights(self) -> dict[str, tuple[WeightSpec, tuple[int, ...]]]:
        """Specification and shape ``(out, in)`` of every quantized weight, by its name in the checkpoint."""
        found = {}
        for index, layout in enumerate(self.source.layouts):
            shapes, stored = self.source.block_shapes(index), self.source.stored_names(index)
            for name in layout.linears:
                weight = f"{name}.weight"
                found[stored[weight]] = (self.scheme.weights.of_linear(name), shapes[weight])
        return found

    def block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        call: BlockCall,
        inputs: Mapping[str, ChannelRange],
        samples: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> QuantizedBlock:
        """Return a block ready to learn.

        Args:
            index: Position of the block.
            tensors: Its original tensors.
            call: How the model calls it.
            inputs: Input ranges of its linears in full precision.
            samples: Sampled inputs of its linears in full precision, where the starting point needs them.
            device: Where the block will be, and ranges and samples are.
        """
        rounds = self.rounding.method == "learned"
        block = self._block(index, tensors, call, self._factors(index, tensors, learned=True, rounds=rounds))
        block = block.to(device)
        self.start.set(index, block.factors, block.tensors, inputs, samples or {})
        return block

    def round_to_nearest(self, index: int, tensors: Mapping[str, Tensor], call: BlockCall) -> QuantizedBlock:
        """Return a block folded without clipping and without transformation: the true baseline.

        It is that of the tensors: of a rotated block if they are :attr:`source`'s and it is rotated, which errors of
        single blocks are compared with, and of the block as it is stored if they are those of :meth:`unrotated`.
        """
        block = self._block(index, tensors, call, self._factors(index, tensors, learned=False))
        block.fold()
        return block

    def folded(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        call: BlockCall,
        factors: Mapping[str, Tensor],
    ) -> QuantizedBlock:
        """Return a block folded with learned factors."""
        block = self._block(index, tensors, call, self._factors(index, tensors, learned=True))
        block.factors.load(factors, f"block {index} of the run folder")
        block.fold()
        return block

    def _factors(self, index: int, tensors: Mapping[str, Tensor], learned: bool, rounds: bool = False) -> BlockFactors:
        layout, heads, weights = self.source.layouts[index], self.source.attention, self.scheme.weights
        if not learned:
            return BlockFactors(layout, tensors, weights, heads)
        shift = self.transform is not None and self.transform.shift
        if shift is None:
            shift = self.scheme.activations is not None
        return BlockFactors(layout, tensors, weights, heads, self.clipping, self.transform, shift, rounds)

    def _block(
        self, index: int, tensors: Mapping[str, Tensor], call: BlockCall, factors: BlockFactors
    ) -> QuantizedBlock:
        layout = self.source.layouts[index]
        network: nn.Module = self.source.make_block(index, tensors)
        network = prepare_block(network, layout.linears, layout.attention, self.scheme.activations)
        return QuantizedBlock(index, network, factors, call)
