"""A linear that computes with packed codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniquant_pl import ops
from omniquant_pl.quant import QuantizedWeight, dynamic_fake_quantize
from omniquant_pl.quant.affine import group_size_of
from omniquant_pl.spec import ActivationSpec, WeightSpec

__all__ = ["PackedLinear"]


class PackedLinear(nn.Module):
    """Stands in the place of ``nn.Linear``; its weight stays in codes of ``spec.bits`` bit.

    Attributes:
        words: int32 ``[out, words]``, codes packed in planes (:mod:`omniquant_pl.ops`).
        scale: ``[out, groups]`` in the dtype of the scheme.
        zero_point: uint8 ``[out, groups]``; ``None`` for symmetric codes.
        bias: ``[out]`` in the dtype of the activations, or ``None``.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        spec: How the weight is quantized.
        activations: Quantization of the input, per token; ``None`` passes it on as it is.
        has_bias: Whether a bias is added.
        dtype: That of the bias.
        device: Where the buffers are made; their content is whatever was there.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: WeightSpec,
        activations: ActivationSpec | None = None,
        has_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits = spec.bits
        self.group_size = group_size_of(spec, in_features)
        self.activations = activations
        groups = out_features, -(-in_features // self.group_size)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        words = ops.words_per_row(in_features, spec.bits, "planes")
        self.register_buffer("words", empty((out_features, words), torch.int32))
        self.register_buffer("scale", empty(groups, getattr(torch, spec.scale_dtype)))
        self.register_buffer("zero_point", None if spec.symmetric else empty(groups, torch.uint8))
        self.register_buffer("bias", empty((out_features,), dtype) if has_bias else None)

    def dequantize(self) -> Tensor:
        """Return the weight ``[out, in]``, float32."""
        codes = ops.unpack(self.words, self.bits, self.in_features, "planes")
        zero_point = self.zero_point
        if zero_point is None:
            zero_point = torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.uint8)
        return QuantizedWeight(codes, self.scale, zero_point, self.group_size).dequantize()

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the linear to ``[..., in]``, in the dtype that it comes in; in float64 by the dequantized weight."""
        if self.activations is not None:
            hidden = dynamic_fake_quantize(hidden, self.activations.bits, self.activations.symmetric)
        if hidden.dtype == torch.float64:  # exact enough to compare with; there is no packed product of it
            return F.linear(hidden, self.dequantize().double(), self.bias)
        rows = hidden.reshape(-1, self.in_features)
        output = ops.packed_linear(rows, self.words, self.scale, self.zero_point, self.bits, self.group_size)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Show shape, widths and group size."""
        bits = 16 if self.activations is None else self.activations.bits
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group_size={self.group_size}, activation_bits={bits}"
