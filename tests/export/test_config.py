"""``config.json`` of exports says nothing of the original's files, and programs load the dtype that it states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniquant_pl.export import FORMATS
from omniquant_pl.export.config import config_of
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec

Finish = Callable[[OmniQuantModel], RunFolder]
STALE = {"_name_or_path": "/home/somebody/model", "quantization_config": None, "torch_dtype": "float16"}


@pytest.fixture
def source(make_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A LLaMA in bfloat16, whose configuration says so by the older name too, and says another one."""
    folder = Path(shutil.copytree(make_llama(), tmp_path / "source"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | STALE))
    return folder


@pytest.mark.parametrize("format_name", ["hf", "packed", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_one_dtype_and_no_trace_of_the_original(
    source: Path, finish: Finish, tmp_path: Path, format_name: str, dtype: Any
) -> None:
    model = OmniQuantModel(str(source), WeightSpec(4))
    FORMATS[format_name](dtype).write(model, finish(model), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == (dtype or ("float32" if format_name == "hf" else "bfloat16"))
    assert "torch_dtype" not in config
    assert "_name_or_path" not in config
    assert ("quantization_config" in config) is (format_name != "hf")


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_transformers_loads_it_in_that_dtype(source: Path, finish: Finish, tmp_path: Path, dtype: Any) -> None:
    model = OmniQuantModel(str(source), WeightSpec(4))
    FORMATS["hf"](dtype).write(model, finish(model), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype or "float32")}


@pytest.mark.parametrize("stated", ["auto", "torch.float16", {"": "bfloat16"}, 16, None])
def test_a_dtype_that_is_none_is_not_stated(stated: Any) -> None:
    assert FORMATS["packed"]().config_dtype({"dtype": stated}) == "float32"


def test_sections_have_no_dtype_of_their_own() -> None:
    section = {"hidden_size": 3, "torch_dtype": "float16", "_name_or_path": "here"}
    found = config_of({"model_type": "a", "text_config": section, "rope": {"type": "b"}, **STALE}, "bfloat16")
    assert found == {"model_type": "a", "text_config": {"hidden_size": 3}, "rope": {"type": "b"}, "dtype": "bfloat16"}
    assert config_of({"a": 1, "torch_dtype": "float16"}) == {"a": 1, "dtype": "float16"}
