"""Files of the original OmniQuant implementation: learned factors and activation statistics.

Names and shapes are those of OpenGVLab/OmniQuant: ``omni_parameters.pth`` holds a dictionary of blocks, whose factors
are named by their quantizer (``self_attn.q_proj.weight_quantizer.upbound_factor``, ``[out * groups, 1]``) or their
pair (``qkv_smooth_scale``); ``act_scales/<model>.pt`` and ``act_shifts/<model>.pt`` hold one vector per linear. All
of them are pickles, and read with ``weights_only``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import BlockLayout
from omniquant_pl.quant import ChannelRange
from omniquant_pl.transform import NormToLinears, QueryToKey, ValueToOutput

__all__ = ["OmniQuantParameters", "OmniQuantStatistics"]

_ENDS = {"upbound_factor": "upper", "lowbound_factor": "lower"}


def _read(path: Path, key: str) -> dict[Any, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigurationError(key, f"there is no file {path}") from error
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigurationError(key, f"{path} cannot be read as tensors alone: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(key, f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _read_vectors(path: Path, key: str) -> dict[str, Tensor]:
    content = _read(path, key)
    for name, vector in content.items():
        if not isinstance(vector, Tensor):
            raise ConfigurationError(key, f"{path}: {name!r} is a {type(vector).__name__}, not a tensor")
    return content


class OmniQuantParameters:
    """Learned factors from an ``omni_parameters.pth``.

    A scale per channel between queries and keys is kept as it is, although it does not commute with the rotary
    embedding: the file stands for the model that was measured with it.

    Args:
        path: The file.
        source: The model.

    Raises:
        ConfigurationError: If the file cannot be read, or lacks a block.
    """

    def __init__(self, path: Path, source: SourceModel) -> None:
        self.path = path
        self._source = source
        self._blocks = _read(path, "model.parameters")
        missing = [index for index in range(len(source)) if not isinstance(self._blocks.get(index), Mapping)]
        if missing:
            raise ConfigurationError("model.parameters", f"{path} has no factors of block {missing[0]}")

    def origin(self, index: int) -> str:
        """Say where a block's factors are from."""
        return f"{self.path}, block {index},"

    def load(self, index: int) -> dict[str, Tensor]:
        """Return one block's factors under our names.

        Raises:
            ConfigurationError: If a factor belongs to no linear and no pair of this family.
        """
        layout, shapes = self._source.layouts[index], self._source.block_shapes(index)
        pairs = _pair_names(layout)
        factors: dict[str, Tensor] = {}
        for name, factor in self._blocks[index].items():
            if not (isinstance(name, str) and isinstance(factor, Tensor)):
                raise ConfigurationError("model.parameters", f"{self.origin(index)} has {name!r}, which is no factor")
            linear, _, leaf = name.rpartition(".weight_quantizer.")
            pair, _, kind = name.partition("_smooth_")
            if linear in layout.linears and leaf in _ENDS:
                rows = shapes[f"{linear}.weight"][0]
                if factor.numel() % rows:
                    message = f"{self.origin(index)} has {name} of shape {tuple(factor.shape)}, for {rows} channels"
                    raise ConfigurationError("model.parameters", message)
                factors[f"{linear}.clip.{_ENDS[leaf]}"] = factor.reshape(rows, -1)
            elif pair in pairs and kind in ("scale", "shift"):
                if kind == "scale" or bool(factor.any()):  # the original stores zeros where it learns no shift
                    factors[f"{pairs[pair]}.{kind}"] = factor
            else:
                raise ConfigurationError("model.parameters", f"{self.origin(index)} has an unknown factor {name}")
        return factors


def _pair_names(layout: BlockLayout) -> dict[str, str]:
    """Return our names of the pairs by the original's."""
    norms = [pair.name for pair in layout.pairs if isinstance(pair, NormToLinears)]
    values = [pair.name for pair in layout.pairs if isinstance(pair, ValueToOutput)]
    queries = [pair.name for pair in layout.pairs if isinstance(pair, QueryToKey)]
    return dict(zip(("qkv", "fc1"), norms, strict=False)) | dict(zip(("out", "qkt"), values + queries, strict=False))


class OmniQuantStatistics:
    """Input ranges of the linears from the original's ``act_scales`` and ``act_shifts`` files.

    Args:
        scales: File of the largest magnitudes per input channel.
        shifts: File of the middles of the ranges; ``None`` for ranges around zero.

    Raises:
        ConfigurationError: If a file cannot be read, or holds anything but vectors of the same channels.
    """

    def __init__(self, scales: Path, shifts: Path | None) -> None:
        self._scales = _read_vectors(scales, "model.transform.scales")
        self._shifts = {} if shifts is None else _read_vectors(shifts, "model.transform.shifts")
        for name in sorted(self._scales.keys() & self._shifts.keys()):
            middle, magnitude = (tuple(vectors[name].shape) for vectors in (self._shifts, self._scales))
            if middle != magnitude:
                message = f"{name} has {middle} channels, not {magnitude}"
                raise ConfigurationError("model.transform.shifts", f"{shifts}: {message}")

    def ranges(self, prefix: str, linears: Iterable[str]) -> dict[str, ChannelRange]:
        """Return the ranges of a block's linears that have the file's magnitudes and middles.

        Args:
            prefix: What the names of the block's modules begin with.
            linears: Names inside the block; those that the file lacks are left out.
        """
        found: dict[str, ChannelRange] = {}
        for name in linears:
            if prefix + name not in self._scales:
                continue
            magnitude = self._scales[prefix + name].float()
            middle = self._shifts.get(prefix + name, torch.zeros(())).float()
            found[name] = ChannelRange(
                low=torch.where(middle > 0, 2 * middle - magnitude, -magnitude),
                high=torch.where(middle > 0, magnitude, 2 * middle + magnitude),
            )
        return found
