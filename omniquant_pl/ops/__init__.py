"""Floor 0: `torch.library` operators, each with a pure-torch default and a fake kernel."""

from omniquant_pl.ops._fake_quantize import (
    dynamic_fake_quantize,
    dynamic_fake_quantize_backward,
    fake_quantize,
    fake_quantize_backward,
)

__all__ = [
    "dynamic_fake_quantize",
    "dynamic_fake_quantize_backward",
    "fake_quantize",
    "fake_quantize_backward",
]
