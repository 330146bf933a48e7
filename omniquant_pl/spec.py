"""What is asked for: frozen, validated descriptions of the scheme and of what is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omniquant_pl.errors import ConfigurationError

__all__ = ["ActivationSpec", "ClippingSpec", "Scheme", "TransformSpec", "WeightSpec"]


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

    def __post_init__(self) -> None:
        _require(2 <= self.bits <= 8, "model.weights.bits", f"{self.bits} is not a width from 2 to 8")
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

    def __post_init__(self) -> None:
        _require_rate(self.lr, "model.clipping")
        _require(math.isfinite(self.initial), "model.clipping.initial", f"{self.initial} is not a finite number")


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
    mlp: bool = False
    """Also scale between the up and down projections of a gated MLP (not in the paper)."""

    def __post_init__(self) -> None:
        _require_rate(self.lr, "model.transform")
        _require(0 <= self.alpha <= 1, "model.transform.alpha", f"{self.alpha} is not within 0 and 1")


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
        return f"w{self.weights.bits}a{activation_bits}{group}{'sym' if self.weights.symmetric else ''}"
