"""What is asked for: frozen, validated descriptions of the scheme and of what is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from omniquant_pl.errors import ConfigurationError

__all__ = [
    "PRECISIONS",
    "ActivationSpec",
    "BudgetSpec",
    "ClippingSpec",
    "FactorRates",
    "LearningSpec",
    "ObjectiveSpec",
    "RotationSpec",
    "RoundingSpec",
    "ScheduleSpec",
    "Scheme",
    "TransformSpec",
    "WeightSpec",
    "WindowSpec",
]


PRECISIONS = ("32-true", "bf16-mixed")
"""Values of ``trainer.precision`` that factors may be learned in."""


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ConfigurationError(key, message)


def _require_rate(rate: float, key: str) -> None:
    message = f"{rate} is not a number above 0 and at most 1; to turn it off set {key} to null"
    _require(0 < rate <= 1, f"{key}.lr", message)


@dataclass(frozen=True)
class WeightSpec:
    """How the weights of the quantized linears are stored.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    bits: int = 4
    """Code width, 2 to 8."""
    group_size: int | None = None
    """Input channels that share a scale; null: one scale per output channel. A last group may be shorter."""
    symmetric: bool = False
    """Signed codes without a zero point; otherwise unsigned codes with one."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """What scales are stored in; codes are chosen against the scale that is stored."""
    bits_of: Mapping[str, int] = field(default_factory=dict)
    """Other widths by kind of linear, the last part of its name: {down_proj: 4}."""

    @property
    def smallest_scale(self) -> float:
        """The floor of learned and of stored scales: float16's smallest normal number, for other dtypes far less."""
        return 2.0**-14 if self.scale_dtype == "float16" else 2.0**-60  # squares of it divide gradients in float32

    def of_linear(self, name: str) -> WeightSpec:
        """Return what holds for the linear with this dotted name."""
        return replace(self, bits=self.bits_of.get(name.rpartition(".")[2], self.bits), bits_of={})

    def __post_init__(self) -> None:
        _require(2 <= self.bits <= 8, "model.weights.bits", f"{self.bits} is not a width from 2 to 8")
        for kind, bits in self.bits_of.items():
            _require(2 <= bits <= 8, f"model.weights.bits_of.{kind}", f"{bits} is not a width from 2 to 8")
        _require(
            self.group_size is None or self.group_size >= 1,
            "model.weights.group_size",
            f"{self.group_size} is neither null (one group per output channel) nor a positive number of channels",
        )


@dataclass(frozen=True)
class ActivationSpec:
    """How linear inputs and attention inputs are quantized: per token, dynamically.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    bits: int = 8
    """Code width, 2 to 8."""
    symmetric: bool = False
    """Signed codes around zero; otherwise a zero point per token."""

    def __post_init__(self) -> None:
        _require(
            2 <= self.bits <= 8,
            "model.activations.bits",
            f"{self.bits} is not a width from 2 to 8; for 16-bit activations set model.activations to null",
        )


@dataclass(frozen=True)
class ClippingSpec:
    """Learnable weight clipping (OmniQuant, section 3.2).

    Raises:
        ConfigurationError: If a value is out of range.
    """

    lr: float = 1.0e-2
    """AdamW learning rate of the clipping factors."""
    initial: float = 4.0
    """Logit that the factors start from; sigmoid(4) = 0.982 of the full range."""
    search: bool = False
    """Start from the shares of the ranges with the least output error (AWQ) instead, at most sigmoid(initial)."""

    def __post_init__(self) -> None:
        _require_rate(self.lr, "model.clipping")
        _require(abs(self.initial) <= 100, "model.clipping.initial", f"{self.initial} is not a logit from -100 to 100")


@dataclass(frozen=True)
class TransformSpec:
    """Learnable equivalent transformation (OmniQuant, section 3.3).

    Raises:
        ConfigurationError: If a value is out of range.
    """

    lr: float = 5.0e-3
    """AdamW learning rate of the channel scales."""
    alpha: float = 0.5
    """Migration strength of the initial scale, max|X|^alpha / max|W|^(1 - alpha); 0 to 1."""
    initial: Literal["smoothquant", "search", "awq", "ones"] = "smoothquant"
    """What scales start from. smoothquant: alpha; search: its alpha with the least output error; awq: the power of
    mean|X| with the least output error; ones: no scale."""
    mlp: bool = False
    """Also scale between the up and down projections of a gated or a ReLU MLP (not in the paper)."""
    shift: bool | None = None
    """Also shift, where operators have biases; null: only where activations are quantized, as in the paper."""
    scales: str | None = None
    """Activation magnitudes to start from, a file of the original's act_scales; null measures them."""
    shifts: str | None = None
    """Middles of the activations' ranges likewise, a file of its act_shifts."""

    def __post_init__(self) -> None:
        _require_rate(self.lr, "model.transform")
        _require(0 <= self.alpha <= 1, "model.transform.alpha", f"{self.alpha} is not within 0 and 1")
        _require(
            self.shifts is None or self.scales is not None,
            "model.transform.shifts",
            "middles alone do not make ranges; give model.transform.scales as well",
        )


@dataclass(frozen=True)
class RotationSpec:
    """Hadamard matrices with random signs, folded into the weights before anything is learned (arXiv 2404.00456).

    Raises:
        ConfigurationError: If a value is out of range.
    """

    residual: bool = True
    """Rotate the residual stream; an embedding and a head that share their weight come apart."""
    values: bool = True
    """Rotate the values of each attention head."""
    seed: int = 0
    """Of the signs."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**64, "model.rotation.seed", f"{self.seed} is below 0, or has more than 64 bit")
        _require(
            self.residual or self.values,
            "model.rotation",
            "neither the residual stream nor the values are to be rotated; to turn it off set model.rotation to null",
        )


@dataclass(frozen=True)
class ScheduleSpec:
    """How the learning rates change over the steps of a block.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    warmup: float = 0.0
    """Share of the steps over which the rates rise from zero."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the rates fall to zero over the steps after that."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.warmup < 1, "model.learning.schedule.warmup", f"{self.warmup} is not a share from 0 to below 1"
        )

    @property
    def is_constant(self) -> bool:
        """Whether the rates stay as they are."""
        return self.warmup == 0 and self.decay == "none"

    def factor(self, step: int, steps: int) -> float:
        """Return what the rates are multiplied with in a step, counted from 0, of that many."""
        warmup = self.warmup * steps
        if step < warmup:
            return (step + 1) / (math.floor(warmup) + 1)
        done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        if self.decay == "linear":
            return 1 - done
        return (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1.0


@dataclass(frozen=True)
class WindowSpec:
    """How many consecutive blocks learn together (arXiv 2312.07950).

    Raises:
        ConfigurationError: If a value is out of range.
    """

    blocks: int = 1
    """Blocks of a window."""
    stride: int = 1
    """Blocks by which windows advance; those that are left behind are folded."""

    def __post_init__(self) -> None:
        _require(self.blocks >= 1, "model.objective.window.blocks", f"{self.blocks} is not a positive number of blocks")
        _require(
            1 <= self.stride <= self.blocks,
            "model.objective.window.stride",
            f"{self.stride} is not from 1 to model.objective.window.blocks, which is {self.blocks}",
        )


@dataclass(frozen=True)
class BudgetSpec:
    """Memory that the hidden states between blocks may take: on the device, else on the host, else files hold them.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    device: float | None = None
    """Gigabytes of the device's memory; null: 40 % of what is free."""
    host: float | None = None
    """Gigabytes of the host's memory; null: 40 % of what is free."""

    def __post_init__(self) -> None:
        for name in ("device", "host"):
            value = getattr(self, name)
            message = f"{value} is neither null nor a number of gigabytes from 0 on"
            _require(value is None or value >= 0, f"model.activation_budget.{name}", message)


@dataclass(frozen=True)
class RoundingSpec:
    """Which codes weights get.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    method: Literal["nearest", "learned", "gptq"] = "nearest"
    """nearest; learned: with an offset per weight, learned along with the other factors; gptq: chosen when a block is
    folded, each making up for the errors of those before it."""
    lr: float = 1.0e-2
    """AdamW learning rate of the offsets, in codes."""

    def __post_init__(self) -> None:
        _require(0 < self.lr <= 1, "model.rounding.lr", f"{self.lr} is not a number above 0 and at most 1")


@dataclass(frozen=True)
class ObjectiveSpec:
    """What a block, or a window of blocks, minimises.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    aug_loss: bool = False
    """Add the error against the full-precision block's output for the quantized stream's input."""
    output_loss: Literal["mse", "kl"] = "mse"
    """Loss of the last block. mse: as every block; kl: divergence of the model's predictions."""
    window: WindowSpec = WindowSpec()
    """Consecutive blocks that learn together."""


@dataclass(frozen=True)
class LearningSpec:
    """How factors learn, whatever their kind.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    schedule: ScheduleSpec = ScheduleSpec()
    """How the learning rates change over the steps of a block."""
    weight_decay: float = 0.0
    """AdamW weight decay of all factors."""
    compile: bool = False
    """Compile the steps by torch.compile, once for all blocks that are alike: half a minute at first, and shorter steps
    from then on. Their gradients differ by rounding."""

    def __post_init__(self) -> None:
        message = f"{self.weight_decay} is not a number from 0 to 1"
        _require(0 <= self.weight_decay <= 1, "model.learning.weight_decay", message)


@dataclass(frozen=True)
class FactorRates:
    """AdamW learning rates by kind of factor, and what all of them share."""

    clipping: float = 0.0
    """Rate of the clipping factors."""
    transform: float = 0.0
    """Rate of scales and shifts."""
    rounding: float = 0.0
    """Rate of the offsets of learned rounding."""
    learning: LearningSpec = LearningSpec()
    """Schedule, weight decay, compilation."""


@dataclass(frozen=True)
class Scheme:
    """Widths of weights and activations together."""

    weights: WeightSpec
    """How weights are stored."""
    activations: ActivationSpec | None = None
    """How activations are quantized; ``None`` leaves them in 16 bit."""

    @property
    def name(self) -> str:
        """The field's short name, for example ``w3a16g128`` or ``w4a4``."""
        activation_bits = 16 if self.activations is None else self.activations.bits
        group = "" if self.weights.group_size is None else f"g{self.weights.group_size}"
        others = "".join(f"-{kind}{bits}" for kind, bits in sorted(self.weights.bits_of.items()))
        return f"w{self.weights.bits}a{activation_bits}{group}{'sym' if self.weights.symmetric else ''}{others}"
