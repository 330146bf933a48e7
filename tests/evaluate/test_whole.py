"""Exported folders that transformers cannot load end in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.evaluate.whole import open_exported


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pad_token_id": 64}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"num_hidden_layers": "1"}, "StrictDataclassFieldValidationError: .*'num_hidden_layers' expected int"),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"sliding_window": 4, "model_type": "nothing"}, ".*has model type `nothing`"),
    ],
    ids=str,
)
def test_one_line(make_llama: Callable[..., Path], changes: dict[str, Any], expected: str) -> None:
    folder = make_llama()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(
        ConfigurationError, match=rf"^exported: transformers cannot load {folder}: {expected}"
    ) as caught:
        open_exported(folder, torch.float32, torch.device("cpu"))
    assert "\n" not in str(caught.value)
