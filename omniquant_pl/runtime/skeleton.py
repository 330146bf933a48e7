"""The model of a packed folder before its tensors are there, and where each of them goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from omniquant_pl.checkpoint.skeleton import build_without_weights, unfuse_experts
from omniquant_pl.checkpoint.tying import absent_tensors, tie
from omniquant_pl.families import BlockLayout, family_of
from omniquant_pl.nn import quantize_attention
from omniquant_pl.quant.narrowing import Narrowing
from omniquant_pl.runtime.codec import PACKED, SCALE, ZERO_POINT, planes_of, stored_tensors, zero_points_of
from omniquant_pl.runtime.linear import PackedLinear
from omniquant_pl.spec import Scheme, WeightSpec

__all__ = ["PackedSkeleton", "Slot"]


@dataclass(frozen=True)
class Slot:
    """Where a stored tensor goes.

    Attributes:
        shape: Its shape in the file.
        dtype: Its dtype there; ``None`` for a float of any width.
        put: Takes it. Raises a ``ValueError`` where its values cannot be.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    put: Callable[[Tensor], None]


class PackedSkeleton:
    """A model of transformers' own class on the meta device, whose quantized linears are packed ones.

    Args:
        config: What ``config.json`` says of the model.
        scheme: How it is quantized.
        names: Names of the tensors that there are.
        dtype: What tensors that are not quantized are converted to.
        device: Where tensors go.

    Attributes:
        slots: Where stored tensors go, by name, in the order of the model.

    Raises:
        ConfigurationError: If the family is not known.
        ValueError: If a tensor is missing or has no place, or the configuration makes no model.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        scheme: Scheme,
        names: Collection[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._scheme, self._names, self._device = scheme, names, device
        self._narrowing = Narrowing(dtype, "dtype")
        whole = _transformers_config(config)
        self._family = family_of(whole)
        self._model = build_without_weights(whole, self._family, trust_remote_code=False)
        blocks, text = self._model.get_submodule(self._family.blocks), whole.get_text_config()
        for index, block in enumerate(cast(nn.ModuleList, blocks)):
            layout = self._family.block(text, index)
            unfuse_experts(block, layout)
            self._swap_linears(block, layout)
            if scheme.activations is not None:
                quantize_attention(block.get_submodule(layout.attention), scheme.activations)
        self._absent = absent_tensors(self._model, lambda name: self._stored_name(name) in names)
        self.slots = dict(self._slots())
        self._check_exclusive()

    def _swap_linears(self, block: nn.Module, layout: BlockLayout) -> None:
        for name in layout.linears:
            linear = cast(nn.Linear, block.get_submodule(name))
            packed = PackedLinear(
                linear.in_features,
                linear.out_features,
                self._scheme.weights.of_linear(name),
                self._scheme.activations,
                linear.bias is not None,
                device="meta",
            )
            block.set_submodule(name, packed)

    def _slots(self) -> Iterator[tuple[str, Slot]]:
        stored = set(self._model.state_dict()) - self._absent
        for path, module in self._model.named_modules():
            if isinstance(module, PackedLinear):
                yield from self._packed_slots(path, module)
            for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                name = f"{path}.{leaf}"
                if name in stored and not (isinstance(module, PackedLinear) and leaf != "bias"):
                    stored_name = self._stored_name(name)
                    put = partial(self._put_float, module, leaf, stored_name)
                    yield stored_name, Slot(tuple(tensor.shape), None, put)

    def _packed_slots(self, path: str, linear: PackedLinear) -> Iterator[tuple[str, Slot]]:
        spec, shape = self._scheme.weights.of_linear(path), (linear.out_features, linear.in_features)
        put = {
            PACKED: lambda tensor: self._set(linear, "words", planes_of(tensor, spec.bits, shape)),
            SCALE: lambda tensor: self._set(linear, "scale", _positive(tensor)),
            ZERO_POINT: lambda tensor: self._set(linear, "zero_point", _zero_points(tensor, spec, linear)),
        }
        for suffix, (stored_shape, dtype) in stored_tensors(spec, shape).items():
            name = self._stored_name(f"{path}.weight", suffix)
            yield name, Slot(stored_shape, dtype, put[suffix])

    def _stored_name(self, name: str, suffix: str | None = None) -> str:
        """Return the name of a tensor in the folder, which may lack the prefix of the model without its head.

        Args:
            name: Its name in the model.
            suffix: What stands in the place of its last part, for a part of a packed weight.
        """
        stored = self._family.stored_name(name)
        names: tuple[str, ...] = (stored, stored.removeprefix(f"{self._model.base_model_prefix}."), name)
        if suffix is not None:
            names = tuple(f"{found.rpartition('.')[0]}.{suffix}" for found in names)
        return next((found for found in names if found in self._names), names[0])

    def _check_exclusive(self) -> None:
        missing = next((name for name in self.slots if name not in self._names), None)
        if missing is not None:
            raise ValueError(f"there is no tensor {missing}")
        packed = (name for name in sorted(self._names) if name.endswith((f".{PACKED}", f".{ZERO_POINT}")))
        strange = next((name for name in packed if name not in self.slots), None)
        if strange is not None:
            raise ValueError(f"{strange} belongs to no quantized linear of this model")

    def _put_float(self, module: nn.Module, leaf: str, name: str, tensor: Tensor) -> None:
        self._set(module, leaf, self._narrowing.cast(name, _finite(tensor)))

    def _set(self, module: nn.Module, leaf: str, tensor: Tensor) -> None:
        tensor = tensor.to(self._device)
        is_parameter = leaf in module._parameters
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def finish(self) -> PreTrainedModel:
        """Return the model, when every slot has got its tensor.

        Raises:
            ConfigurationError: If a dequantized weight is beyond the dtype that products may compute in.
        """
        for path, module in self._model.named_modules():
            if isinstance(module, PackedLinear):
                self._narrowing.check_weight(f"{path}.weight", module.scale, module.dequantize)
        tie(self._model, self._absent)
        nn.Module.to(self._model, self._device)
        self._model.eval()
        return self._model


def _transformers_config(config: Mapping[str, Any]) -> PretrainedConfig:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ValueError(f"the family {family!r} is unknown")
    found: PretrainedConfig = CONFIG_MAPPING[family].from_dict(dict(config))
    return found


def _finite(tensor: Tensor) -> Tensor:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise ValueError(f"has {int((~finite).sum())} values that are NaN or infinite")
    return tensor


def _positive(scale: Tensor) -> Tensor:
    if not bool((_finite(scale) > 0).all()):
        raise ValueError(f"has {int((scale <= 0).sum())} scales that are not above 0")
    return scale


def _zero_points(stream: Tensor, spec: WeightSpec, linear: PackedLinear) -> Tensor:
    return zero_points_of(stream, spec.bits, (linear.out_features, linear.scale.shape[1]))
