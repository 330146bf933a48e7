"""What exceptions say in one line, and that modules do not hide them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import omniquant_pl
from omniquant_pl.errors import one_line, unmasked


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("foo"), "KeyError: 'foo'"),
        (AssertionError(), "AssertionError"),
        (ValueError(), "ValueError"),
        (TypeError("not\ta number"), "TypeError: not a number"),
    ],
)
def test_one_line(error: Exception, expected: str) -> None:
    assert one_line(error) == expected


class Masking(nn.Module):
    @property
    def plain(self) -> int:
        return self.nothing_of_that_name

    @property
    @unmasked
    def shown(self) -> int:
        return self.nothing_of_that_name

    @cached_property
    @unmasked
    def kept(self) -> list[int]:
        return []


def test_an_attribute_error_is_masked_unless_the_property_prevents_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plain'"):
        _ = Masking().plain
    with pytest.raises(RuntimeError, match=r"^Masking\.shown: .*no attribute 'nothing_of_that_name'") as caught:
        _ = Masking().shown
    assert isinstance(caught.value.__cause__, AttributeError)
    module = Masking()
    assert module.kept is module.kept


def _subclasses(kind: type) -> Iterator[type]:
    for found in kind.__subclasses__():
        yield found
        yield from _subclasses(found)


def _properties() -> list[tuple[type, str, Any]]:
    """Every property that the package defines on an ``nn.Module``, and the function that reads it."""
    root = Path(omniquant_pl.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            try:
                importlib.import_module(name)
            except ImportError:  # for another package, which is not installed
                continue
    kinds = {kind for kind in _subclasses(nn.Module) if kind.__module__.startswith("omniquant_pl.")}
    found = [(kind, *entry) for kind in kinds for entry in vars(kind).items()]
    return [(kind, name, _reader(value)) for kind, name, value in found if _is_concrete(value)]


def _is_concrete(value: Any) -> bool:
    return isinstance(value, property | cached_property) and not getattr(value, "__isabstractmethod__", False)


def _reader(value: Any) -> Any:
    return value.fget if isinstance(value, property) else value.func


def test_no_property_of_a_module_hides_an_attribute_error() -> None:
    properties = _properties()
    assert {"source", "start", "quantized_weights", "tensors", "changed"} <= {name for _, name, _ in properties}
    hidden = {
        f"{kind.__name__}.{name}" for kind, name, read in properties if read.__code__ is not unmasked(len).__code__
    }
    assert hidden == set(), "decorate what they read with @unmasked"
