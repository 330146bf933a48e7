"""A linear whose input is quantized and whose weight is not a parameter."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from omniquant_pl.quant import dynamic_fake_quantize
from omniquant_pl.spec import ActivationSpec

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """``nn.Linear`` for calibration: frozen weight and bias as buffers, input quantized per token.

    Its ``weight`` holds whatever the block was last given: the original, the fake-quantized or the folded values.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or ``None``.
        activations: Quantization of the input; ``None`` passes it on as it is.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, activations: ActivationSpec | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, activations: ActivationSpec | None) -> QuantLinear:
        """Take over weight and bias of an existing linear, without copying them."""
        return cls(linear.weight, cast("Tensor | None", linear.bias), activations)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the linear to ``[..., in]``."""
        if self.activations is not None:
            hidden = dynamic_fake_quantize(hidden, self.activations.bits, self.activations.symmetric)
        return F.linear(hidden, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show the shape and the activation width."""
        bits = 16 if self.activations is None else self.activations.bits
        return f"in_features={self.in_features}, out_features={self.out_features}, activation_bits={bits}"
