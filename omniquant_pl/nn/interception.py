"""Quantized attention inputs where a module calls torch's attention itself, not through transformers' interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from omniquant_pl.nn.attention import AttentionInputs

__all__ = ["intercept_attention"]

_ATTENTION = F.scaled_dot_product_attention


class _Interception(TorchFunctionMode):
    """Quantizes q, k and v of every scaled dot-product attention that is called while it is entered."""

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__()
        self._inputs = inputs
        self.calls = 0

    @override
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        called = self._attend if func is _ATTENTION else func
        return called(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        return _ATTENTION(*self._inputs(query, key, value), *arguments, **options)


def _intercepted(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules that compute what ``kind`` does, with their attention inputs quantized."""

    class Intercepted(kind):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            with _Interception(cast(AttentionInputs, self.attention_inputs)) as interception:
                result = super().forward(*arguments, **options)
            if not interception.calls:
                raise RuntimeError(f"{kind.__name__} does not call scaled_dot_product_attention")
            return result

    Intercepted.__name__ = Intercepted.__qualname__ = f"Intercepted{kind.__name__}"
    return Intercepted


def intercept_attention(module: nn.Module, inputs: AttentionInputs) -> None:
    """Make a module quantize what it hands to ``torch.nn.functional.scaled_dot_product_attention``.

    Only calls inside this module's forward are concerned. The module gets a subclass of its own class, as hooks could
    not take the interception back after every error and a wrapper would change the names of the weights.

    Args:
        module: The attention module; it raises a ``RuntimeError`` when its forward makes no such call.
        inputs: Quantizes q, k and v; becomes its child ``attention_inputs``.
    """
    module.add_module("attention_inputs", inputs)
    module.__class__ = _intercepted(type(module))
