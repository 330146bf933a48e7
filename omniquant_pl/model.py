"""The whole model's quantization: the ``model:`` section of a configuration, and the blocks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from omniquant_pl.block import BlockModule, LearningRates
from omniquant_pl.checkpoint import BlockCall, SourceModel, locate_model
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.factors import BlockFactors
from omniquant_pl.nn import prepare_block
from omniquant_pl.quant import ChannelRange
from omniquant_pl.run_folder import RunFolder
from omniquant_pl.spec import ActivationSpec, ClippingSpec, Scheme, TransformSpec, WeightSpec

__all__ = ["OmniQuantModel"]


class OmniQuantModel(LightningModule):
    """What to quantize and how. It has no parameters itself; every block becomes a :class:`BlockModule`.

    Args:
        path: Name of an embedded checkpoint (tiny-llama), a local model folder, or a hub id owner/name.
        weights: Quantization of the weights.
        activations: Quantization of linear and attention inputs; null leaves them in 16 bit.
        clipping: Learnable weight clipping; null turns it off.
        transform: Learnable equivalent transformation; null turns it off.
        aug_loss: Add the error against the full-precision block's output for the quantized stream's input.
        parameters: Run folder whose learned factors are the starting point; null starts from the calibration set.
        trust_remote_code: Let Python code that comes with the checkpoint run.
    """

    def __init__(
        self,
        path: str = "tiny-llama",
        weights: WeightSpec = WeightSpec(),  # noqa: B008 (frozen)
        activations: ActivationSpec | None = None,
        clipping: ClippingSpec | None = ClippingSpec(),  # noqa: B008 (frozen)
        transform: TransformSpec | None = None,
        aug_loss: bool = False,
        parameters: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.scheme = Scheme(weights, activations)
        self.clipping = clipping
        self.transform = transform
        self.aug_loss = aug_loss
        self._start = parameters
        self._trust_remote_code = trust_remote_code

    @cached_property
    def source(self) -> SourceModel:
        """The checkpoint, opened at first use.

        Raises:
            ConfigurationError: If it cannot be used.
        """
        return SourceModel(locate_model(self.path), self._trust_remote_code)

    @cached_property
    def initial_factors(self) -> RunFolder | None:
        """The run whose factors are the starting point.

        Raises:
            ConfigurationError: If it is not the folder of a finished run.
        """
        if self._start is None:
            return None
        folder = RunFolder(Path(self._start))
        files = [folder.factor_file(index) for index in range(len(self.source))]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise ConfigurationError(
                "model.parameters",
                f"{self._start} is not the folder of a finished run: {missing[0]} is missing",
            )
        return folder

    def verify(self) -> None:
        """Opens and reads everything once.

        Raises:
            ConfigurationError: If the model or the factors to start from cannot be used.
        """
        self.source.verify()
        if self.initial_factors is not None:
            factors = self._factors(self.source.block_tensors(0), learned=True)
            for index in range(len(self.source)):
                path = self.initial_factors.factor_file(index)
                factors.load(self.initial_factors.load_factors(index, "model.parameters"), str(path))

    @property
    def linear_shapes(self) -> list[tuple[int, ...]]:
        """``(out, in)`` of every quantized linear of the model."""
        shapes = self.source.block_shapes
        return [shapes[f"{name}.weight"] for name in self.source.layout.linears] * len(self.source)

    def block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        call: BlockCall,
        inputs: Mapping[str, ChannelRange],
    ) -> BlockModule:
        """Returns a block ready to learn.

        Args:
            index: Position of the block.
            tensors: Its original tensors.
            call: How the model calls it.
            inputs: Input ranges of its linears in full precision.
        """
        block = self._block(index, tensors, call, self._factors(tensors, learned=True))
        if self.initial_factors is None:
            block.factors.initialize(tensors, inputs)
        else:
            factors = self.initial_factors.load_factors(index, "model.parameters")
            block.factors.load(factors, str(self.initial_factors.factor_file(index)))
        return block

    def round_to_nearest(self, index: int, tensors: Mapping[str, Tensor], call: BlockCall) -> BlockModule:
        """Returns a block folded without clipping and without transformation: the true baseline."""
        block = self._block(index, tensors, call, self._factors(tensors, learned=False))
        block.fold()
        return block

    def folded(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        call: BlockCall,
        factors: Mapping[str, Tensor],
    ) -> BlockModule:
        """Returns a block folded with learned factors."""
        block = self._block(index, tensors, call, self._factors(tensors, learned=True))
        block.factors.load(factors, f"block {index} of the run folder")
        block.fold()
        return block

    def _factors(self, tensors: Mapping[str, Tensor], learned: bool) -> BlockFactors:
        clipping, transform = (self.clipping, self.transform) if learned else (None, None)
        source = self.source
        return BlockFactors(source.layout, tensors, self.scheme.weights, source.attention, clipping, transform)

    def _block(self, index: int, tensors: Mapping[str, Tensor], call: BlockCall, factors: BlockFactors) -> BlockModule:
        rates = LearningRates(
            clipping=0.0 if self.clipping is None else self.clipping.lr,
            transform=0.0 if self.transform is None else self.transform.lr,
        )
        layout = self.source.layout
        network: nn.Module = self.source.make_block(index, tensors)
        network = prepare_block(network, layout.linears, layout.attention, self.scheme.activations)
        return BlockModule(index, network, factors, call, rates)
