"""What stands under ``quantization_config`` in the ``config.json`` of a packed folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.spec import ActivationSpec, Scheme, WeightSpec

__all__ = ["describe_scheme", "read_scheme"]

_METHOD, _VERSION = "omniquant", 1
_SCALE_DTYPES = ("float16", "bfloat16", "float32")


def describe_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return how a model is quantized, as JSON holds it."""
    weights, activations = scheme.weights, scheme.activations
    return {
        "quant_method": _METHOD,
        "version": _VERSION,
        "bits": weights.bits,
        "group_size": weights.group_size,
        "symmetric": weights.symmetric,
        "scale_dtype": weights.scale_dtype,
        "bits_of": dict(weights.bits_of),
        "activations": (
            None if activations is None else {"bits": activations.bits, "symmetric": activations.symmetric}
        ),
    }


def read_scheme(described: Any) -> Scheme:
    """Return the inverse of :func:`describe_scheme`.

    Args:
        described: What JSON held.

    Raises:
        ValueError: It says which key cannot be read, and what stands there.
    """
    section = _Section(described, "quantization_config")
    method, version = section.get("quant_method"), section.get("version")
    if method != _METHOD:
        raise ValueError(f"quantization_config.quant_method is {method!r}, not {_METHOD!r}")
    if version != _VERSION or isinstance(version, bool):
        raise ValueError(f"quantization_config.version is {version!r}; this program reads {_VERSION}")
    bits_of = _Section(section.get("bits_of"), "quantization_config.bits_of")
    try:
        return Scheme(
            WeightSpec(
                bits=section.integer("bits"),
                group_size=None if section.get("group_size") is None else section.integer("group_size"),
                symmetric=section.flag("symmetric"),
                scale_dtype=section.choice("scale_dtype", _SCALE_DTYPES),
                bits_of={kind: bits_of.integer(kind) for kind in bits_of.content},
            ),
            _activations(section.get("activations")),
        )
    except ConfigurationError as error:  # a value that no scheme has
        raise ValueError(f"quantization_config: {error}") from error


def _activations(described: Any) -> ActivationSpec | None:
    if described is None:
        return None
    section = _Section(described, "quantization_config.activations")
    return ActivationSpec(section.integer("bits"), section.flag("symmetric"))


class _Section:
    """A mapping of JSON whose values are what they should be, or refused by their key."""

    def __init__(self, content: Any, name: str) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{name} is {content!r}, not a mapping")
        self.content = content
        self._name = name

    def get(self, key: str) -> Any:
        if key not in self.content:
            raise ValueError(f"{self._name} has no {key}")
        return self.content[key]

    def integer(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{self._name}.{key} is {value!r}, not a whole number")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise ValueError(f"{self._name}.{key} is {value!r}, neither true nor false")
        return value

    def choice(self, key: str, known: tuple[str, ...]) -> Any:
        value = self.get(key)
        if value not in known:
            raise ValueError(f"{self._name}.{key} is {value!r}, none of {', '.join(known)}")
        return value
