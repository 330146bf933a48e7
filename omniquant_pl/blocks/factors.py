"""The learned factors of one block, and what they make of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.families import BlockLayout
from omniquant_pl.quant import FULL_RANGE_LOGIT, QuantizedWeight, RowRange, WeightQuantizer, gptq_codes
from omniquant_pl.spec import ClippingSpec, TransformSpec, WeightSpec
from omniquant_pl.transform import AttentionShape, NormToLinears, Pair

__all__ = ["BlockFactors", "FoldedBlock"]

_CODES = ".codes"


@dataclass(frozen=True)
class FoldedBlock:
    """A block with its factors folded in.

    Attributes:
        tensors: All weights and biases of the block, float32, the quantized ones dequantized from their codes.
        quantized: Codes, scales and zero points of the quantized linears by name.
    """

    tensors: dict[str, Tensor]
    quantized: dict[str, QuantizedWeight]


class BlockFactors(nn.Module):
    """Clipping factors of the linears and scales of the pairs; maps original tensors to what the block runs with.

    Args:
        layout: The family's block.
        tensors: The block's original tensors by name, float32.
        weights: Quantization of the weights.
        attention: The heads.
        clipping: Learnable clipping; ``None`` for full ranges.
        transform: Learnable equivalent transformation; ``None`` for none.
        shift: Whether the transformation shifts where it can.
        rounds: Whether rounding is learned.

    Attributes:
        shared_inputs: By the name of every linear, the one that stands for all that read the same.
        codes: Codes of linears ``[out, in]`` that are not the nearest ones.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tensors: Mapping[str, Tensor],
        weights: WeightSpec,
        attention: AttentionShape,
        clipping: ClippingSpec | None = None,
        transform: TransformSpec | None = None,
        shift: bool = False,
        rounds: bool = False,
    ) -> None:
        super().__init__()
        pairs = () if transform is None else layout.pairs + (layout.mlp_pairs if transform.mlp else ())
        self.pairs = nn.ModuleDict({_key(pair.name): pair.build(tensors, attention, shift) for pair in pairs})
        self.quantizers = nn.ModuleDict()
        for name in layout.linears:
            out_features, in_features = tensors[f"{name}.weight"].shape
            spec = weights.of_linear(name)
            self.quantizers[_key(name)] = WeightQuantizer(spec, (out_features, in_features), clipping, rounds)
        self.codes: dict[str, Tensor] = {}
        self.shared_inputs = _shared_inputs(layout)
        self._constant_ranges: dict[str, RowRange] = {}

    def named_pairs(self) -> Iterator[tuple[str, Pair]]:
        """Yield name and pair."""
        for key, pair in self.pairs.items():
            assert isinstance(pair, Pair)
            yield _name(key), pair

    def named_quantizers(self) -> Iterator[tuple[str, WeightQuantizer]]:
        """Yield the linear's name and its quantizer."""
        for key, quantizer in self.quantizers.items():
            assert isinstance(quantizer, WeightQuantizer)
            yield _name(key), quantizer

    @torch.no_grad()
    def round_to_nearest(self, names: Collection[str]) -> None:
        """Leave linears at round-to-nearest in their full range: there is nothing that they could learn from.

        Pairs all of whose readers are among them keep their initial scale.
        """
        for name, quantizer in self.named_quantizers():
            if name in names:
                for end in (quantizer.upper, quantizer.lower):
                    if end is not None:
                        end.fill_(FULL_RANGE_LOGIT)
                quantizer.requires_grad_(False)
        for _, pair in self.named_pairs():
            if pair.consumers and all(name in names for name in pair.consumers):
                pair.requires_grad_(False)

    def project(self) -> None:
        """Return scales and offsets to where they are allowed, after an optimizer step."""
        for _, pair in self.named_pairs():
            pair.project()
        for _, quantizer in self.named_quantizers():
            quantizer.project()

    def freeze_ranges(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute the ranges of weights that no pair changes once, on the device where the tensors are."""
        changed = {name for _, pair in self.named_pairs() for name in pair.changed}
        self._constant_ranges = {
            name: quantizer.range_of(tensors[f"{name}.weight"])
            for name, quantizer in self.named_quantizers()
            if f"{name}.weight" not in changed
        }

    def release_ranges(self) -> None:
        """Forget the ranges of :meth:`freeze_ranges`."""
        self._constant_ranges = {}

    def transformed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the pairs: the same function of the block's input as the originals, before quantization."""
        result = dict(tensors)
        for _, pair in self.named_pairs():
            pair.apply_to(result)
        return result

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors transformed and fake-quantized, differentiable in the factors."""
        result = self.transformed(tensors)
        for name, quantizer in self.named_quantizers():
            weight = f"{name}.weight"
            result[weight] = quantizer(result[weight], self._constant_ranges.get(name))
        return result

    @torch.no_grad()
    def choose_codes(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Choose codes that make up for each other's errors (GPTQ), for good.

        Args:
            tensors: The block's original tensors, on the CPU.
            moments: Second moments ``[in, in]`` of the linears' inputs; a linear without one keeps its nearest codes.
        """
        transformed = self.transformed(tensors)
        for name, quantizer in self.named_quantizers():
            if name in moments:
                weight = transformed[f"{name}.weight"]
                nearest = quantizer.quantize(weight)
                self.codes[name] = gptq_codes(weight, moments[name], nearest, quantizer.spec.bits)

    @torch.no_grad()
    def fold(self, tensors: Mapping[str, Tensor]) -> FoldedBlock:
        """Choose the codes, against scales rounded to the dtype that they are stored in.

        Codes that are not the nearest ones, after learned rounding, are kept from here on.

        Args:
            tensors: The block's original tensors, on the CPU so that the codes do not depend on the device.

        Raises:
            CalibrationError: If a scale overflows its dtype.
        """
        result = self.transformed(tensors)
        quantized: dict[str, QuantizedWeight] = {}
        for name, quantizer in self.named_quantizers():
            quantized[name] = quantizer.quantize(result[f"{name}.weight"], self.codes.get(name))
            if not bool(torch.isfinite(quantized[name].scale).all()):
                raise CalibrationError(
                    f"{name}: its weights need scales beyond what {quantizer.spec.scale_dtype} can hold; "
                    "set model.weights.scale_dtype to float32"
                )
            if quantizer.offset is not None:
                self.codes[name] = quantized[name].codes
            result[f"{name}.weight"] = quantized[name].dequantize()
        return FoldedBlock(result, quantized)

    def export(self) -> dict[str, Tensor]:
        """Return the factors under the names they have in files.

        They are ``<linear>.clip.upper``, ``<pair>.scale`` and so on, and ``<linear>.codes`` where not the nearest
        codes were chosen.
        """
        factors = {name: owner.get_parameter(leaf).detach() for name, (owner, leaf) in self._factors().items()}
        return factors | {f"{name}{_CODES}": codes for name, codes in self.codes.items()}

    def load(self, factors: Mapping[str, Tensor], origin: str) -> None:
        """Set the factors, and the codes if there are any, from a file's.

        Args:
            factors: As :meth:`export` returns them.
            origin: Where they are from, for the error.

        Raises:
            ConfigurationError: If names or shapes are not those of this block and these settings.
        """
        own = self._factors()
        codes = {name.removesuffix(_CODES): factors[name] for name in factors if name.endswith(_CODES)}
        shapes = {name: quantizer.shape for name, quantizer in self.named_quantizers()}
        learned = {name: factor for name, factor in factors.items() if not name.endswith(_CODES)}
        differing = sorted(set(own) ^ set(learned))
        differing += [
            name for name, (owner, leaf) in own.items() if name in learned and not _fits(owner, leaf, learned[name])
        ]
        differing += [f"{name}{_CODES}" for name in codes if tuple(codes[name].shape) != shapes.get(name)]
        if differing:
            raise ConfigurationError(
                "model.parameters", f"{origin} does not fit these settings: {min(differing)} differs"
            )
        for name, (owner, leaf) in own.items():
            setattr(owner, leaf, nn.Parameter(learned[name].detach().to(owner.get_parameter(leaf), copy=True)))
        self.codes = codes

    def _factors(self) -> dict[str, tuple[nn.Module, str]]:
        """Return the module and the name inside it of every factor that files hold, by its name there.

        Offsets are not among them: their codes are.
        """
        owners: list[tuple[str, nn.Module]] = [(f"{name}.clip", found) for name, found in self.named_quantizers()]
        owners += self.named_pairs()
        return {
            f"{name}.{leaf}": (owner, leaf)
            for name, owner in owners
            for leaf, _ in owner.named_parameters()
            if leaf != "offset"
        }


def _shared_inputs(layout: BlockLayout) -> dict[str, str]:
    """Return a norm's linears read the same, unless a router stands between."""
    groups = [pair.linears for pair in layout.pairs if isinstance(pair, NormToLinears) and not pair.others]
    found = {name: name for name in layout.linears}
    return found | {name: group[0] for group in groups for name in group}


def _fits(owner: nn.Module, leaf: str, factor: Tensor) -> bool:
    """Return whether a factor has the shape of a parameter, or one that its pair takes as well."""
    other = owner.other_shapes if isinstance(owner, Pair) else ()
    return factor.shape in (owner.get_parameter(leaf).shape, *other)


def _key(name: str) -> str:
    """Return a module's name cannot contain dots."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
