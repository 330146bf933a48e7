"""Where learning starts: the calibration set's statistics, another run's factors, or files of the original."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.initialization.factor_file import FACTOR_FILE, FactorFile
from omniquant_pl.initialization.omniquant_files import OmniQuantParameters, OmniQuantStatistics
from omniquant_pl.initialization.run_factors import RunFactors
from omniquant_pl.initialization.statistics import initialize_clipping, initialize_scales
from omniquant_pl.quant import ChannelRange
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import ActivationSpec, ClippingSpec, TransformSpec

__all__ = ["Initializer"]

_log = logging.getLogger(__name__)


class _LearnedFactors(Protocol):
    def origin(self, index: int) -> str: ...

    def load(self, index: int) -> dict[str, Tensor]: ...


def _check_unrotated(source: SourceModel, path: Path) -> None:
    if source.rotation is not None:
        message = f"{path} belongs to the channels of the model as it is stored; set model.rotation to null"
        raise ConfigurationError("model.rotation", message)


def _open_learned(path: Path, source: SourceModel) -> _LearnedFactors:
    if path.suffix in (".pth", ".pt"):
        _check_unrotated(source, path)
        return OmniQuantParameters(path, source)
    if path.suffix == ".safetensors" or (path / FACTOR_FILE).is_file():
        return FactorFile(path if path.suffix == ".safetensors" else path / FACTOR_FILE, source)
    return RunFactors(RunFolder(path), source)


class Initializer:
    """Sets the factors of blocks before they learn.

    Args:
        source: The model.
        parameters: Run folder, file of factors, or an original ``omni_parameters.pth``, whose factors are taken over;
            ``None`` for factors from activation statistics.
        clipping: Where clipping starts otherwise.
        transform: Where scales start otherwise, and from whose statistics.
        activations: How the linears quantize their inputs.

    Raises:
        ConfigurationError: If a file or folder cannot be used.
    """

    def __init__(
        self,
        source: SourceModel,
        parameters: str | None,
        clipping: ClippingSpec | None,
        transform: TransformSpec | None,
        activations: ActivationSpec | None,
    ) -> None:
        self._source = source
        self._clipping = clipping
        self._transform = transform
        self._activations = activations
        if parameters is not None and transform is not None and transform.scales is not None:
            message = "factors that are taken over need no statistics to start from; set it or model.parameters to null"
            raise ConfigurationError("model.transform.scales", message)
        self._learned: _LearnedFactors | None = None
        self._has_warned = False
        if parameters is not None:
            path = Path(parameters)
            self._learned = _open_learned(path, source)
        self._statistics: OmniQuantStatistics | None = None
        if transform is not None and transform.scales is not None:
            _check_unrotated(source, Path(transform.scales))
            shifts = None if transform.shifts is None else Path(transform.shifts)
            self._statistics = OmniQuantStatistics(Path(transform.scales), shifts)

    @property
    def needs_no_calibration(self) -> bool:
        """Whether files alone decide, so that they can be tried before any work."""
        return self._learned is not None or self._statistics is not None

    @property
    def is_learned(self) -> bool:
        """Whether it is factors that have learned before."""
        return self._learned is not None

    @property
    def needs_samples(self) -> bool:
        """Whether something is searched for, on sampled inputs of the linears."""
        if self._learned is not None:
            return False
        scales = self._transform is not None and self._transform.initial in ("search", "awq")
        return scales or (self._clipping is not None and self._clipping.search)

    def _warn_of_codes(self, origin: str) -> None:
        """Say once that what is taken over is not all that made the other run's model."""
        if not self._has_warned:
            _log.warning(
                "model.parameters: %s and those after it have codes that are not the nearest ones; scales and clipping "
                "are taken over, codes are not, so that without epochs this is not that run's model",
                origin,
            )
        self._has_warned = True

    def set(
        self,
        index: int,
        factors: BlockFactors,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, ChannelRange],
        samples: Mapping[str, Tensor],
    ) -> None:
        """Set the factors of one block.

        Args:
            index: Position of the block.
            factors: What is set.
            tensors: The block's original tensors, on one device with factors, ranges and samples.
            inputs: Input ranges of its linears in full precision.
            samples: Sampled inputs of its linears in full precision, where they are needed.

        Raises:
            ConfigurationError: If factors or statistics do not fit the block.
        """
        if self._learned is not None:
            factors.load(self._learned.load(index), self._learned.origin(index))
            if factors.codes:
                factors.codes = {}
                self._warn_of_codes(self._learned.origin(index))
            return
        if self._statistics is not None:
            inputs = self._statistics.ranges(self._source.block_prefix(index), self._source.layouts[index].linears)
            shapes = self._source.block_shapes(index)
            for name, found in inputs.items():
                if found.low.shape != (shapes[f"{name}.weight"][1],):
                    message = f"{self._source.block_prefix(index)}{name} has {tuple(found.low.shape)} channels"
                    raise ConfigurationError("model.transform.scales", message)
            if not inputs:
                message = f"the file has no linear whose name begins with {self._source.block_prefix(index)}"
                raise ConfigurationError("model.transform.scales", message)
            device = next(iter(tensors.values())).device
            inputs = {name: ChannelRange(found.low.to(device), found.high.to(device)) for name, found in inputs.items()}
        if self._transform is not None:
            initialize_scales(factors, tensors, inputs, samples, self._transform, self._activations)
        if self._clipping is not None and self._clipping.search:
            initialize_clipping(factors, tensors, samples, self._clipping, self._activations)
