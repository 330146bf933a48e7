"""Code that comes with a checkpoint: along where it is trusted, not named where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from omniquant_pl.export import FORMATS
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec
from tiny_tokenizers import byte_level

Finish = Callable[[OmniQuantModel], RunFolder]
CLASSES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    own = True\n",
    "helping_own.py": "NAME = 'own'\n",
    "modeling_own.py": (
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "from .helping_own import NAME\nclass OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "    name = NAME\n"
    ),
    "training.py": "raise RuntimeError\n",
}


@pytest.fixture
def source(make_llama: Callable[..., Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(make_llama(), tmp_path / "source"))
    byte_level().save_pretrained(folder)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    change(folder / "config.json", auto_map=CLASSES)
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def exported(source: Path, target: Path, finish: Finish, format_name: str, trusts: bool) -> Path:
    model = OmniQuantModel(str(source), WeightSpec(8), trust_remote_code=trusts)
    FORMATS[format_name]().write(model, finish(model), target)
    return target


@pytest.mark.parametrize("format_name", ["hf", "packed", "compressed-tensors", "gptq"])
@pytest.mark.parametrize("trusts", [True, False])
def test_what_auto_map_names_is_there(
    source: Path, finish: Finish, tmp_path: Path, format_name: str, trusts: bool
) -> None:
    folder = exported(source, tmp_path / "out", finish, format_name, trusts)
    found = json.loads((folder / "config.json").read_text()).get("auto_map", {})
    assert found == (CLASSES if trusts else {})
    code = {path.name for path in folder.glob("*.py")}
    assert code == ({"configuration_own.py", "helping_own.py", "modeling_own.py"} if trusts else set())
    assert ("`auto_map`" in (folder / "README.md").read_text()) is not trusts


@pytest.mark.parametrize("trusts", [True, False])
@pytest.mark.parametrize("loads_code", [True, False])
def test_transformers_loads_it_either_way(
    source: Path, finish: Finish, tmp_path: Path, tokens: Tensor, trusts: bool, loads_code: bool
) -> None:
    folder = exported(source, tmp_path / "out", finish, "hf", trusts)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=loads_code)
    assert type(model).__name__ == ("OwnForCausalLM" if trusts and loads_code else "LlamaForCausalLM")
    original = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        expected, found = original(tokens).logits, model(tokens).logits
    assert (found - expected).norm() < 0.05 * expected.norm()  # 8 bit


def test_code_that_is_missing_is_not_named(source: Path, finish: Finish, tmp_path: Path) -> None:
    (source / "modeling_own.py").unlink()
    folder = exported(source, tmp_path / "out", finish, "hf", trusts=True)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {"AutoConfig": CLASSES["AutoConfig"]}
    assert "modeling_own" not in "".join(path.name for path in folder.iterdir())


@pytest.mark.parametrize("trusts", [True, False])
def test_tokenizers(source: Path, finish: Finish, tmp_path: Path, trusts: bool) -> None:
    (source / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    own = 1\n"
    )
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
    folder = exported(source, tmp_path / "out", finish, "hf", trusts)
    assert (folder / "tokenization_own.py").is_file() is trusts
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts)
    assert hasattr(tokenizer, "own") is trusts
    assert tokenizer("some text")["input_ids"] == AutoTokenizer.from_pretrained(source)("some text")["input_ids"]


def test_code_of_another_repository_is_named_only_if_trusted(source: Path, finish: Finish, tmp_path: Path) -> None:
    other = {"AutoConfig": "owner/name--configuration_other.OtherConfig"}
    change(source / "config.json", auto_map=other)
    settings = OmniQuantModel(str(source), WeightSpec(8))
    FORMATS["hf"]().write(settings, finish(settings), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
