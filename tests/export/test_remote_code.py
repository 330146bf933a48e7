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
WITH_CONFIG = ["hf", "packed", "compressed-tensors", "gptq"]
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
    folder = Path(shutil.copytree(make_llama(vocab_size=520), tmp_path / "source"))
    byte_level().save_pretrained(folder)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    change(folder / "config.json", auto_map=CLASSES)
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def exported(source: Path, target: Path, finish: Finish, format_name: str, trusts: bool) -> Path:
    model = OmniQuantModel(str(source), WeightSpec(8 if format_name != "mlc" else 3), trust_remote_code=trusts)
    FORMATS[format_name]().write(model, finish(model), target)
    return target


@pytest.mark.parametrize("format_name", WITH_CONFIG)
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


@pytest.mark.parametrize("missing", ["modeling_own.py", "helping_own.py"], ids=["itself", "imported by it"])
def test_code_that_is_missing_is_not_named(source: Path, finish: Finish, tmp_path: Path, missing: str) -> None:
    (source / missing).unlink()
    folder = exported(source, tmp_path / "out", finish, "hf", trusts=True)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {"AutoConfig": CLASSES["AutoConfig"]}
    assert [path.name for path in folder.glob("*.py")] == ["configuration_own.py"]
    card = (folder / "README.md").read_text()
    assert "Python code for `AutoModelForCausalLM` is left out, and its `auto_map` with it: not all of it" in card
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).config.own  # by what is there


@pytest.mark.parametrize("reference", ["../elsewhere.OwnConfig", "deeper.elsewhere.OwnConfig", "OwnConfig", "", 7])
def test_what_is_no_file_of_the_folder_is_not_named(
    source: Path, finish: Finish, tmp_path: Path, reference: Any
) -> None:
    for folder in (source.parent, source / "deeper"):
        folder.mkdir(exist_ok=True)
        (folder / "elsewhere.py").write_text(CODE["configuration_own.py"])
    (source / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": reference}}))
    target = exported(source, tmp_path / "out", finish, "hf", trusts=True)
    assert json.loads((target / "preprocessor_config.json").read_text()) == {}
    assert not list(target.rglob("elsewhere.py"))


class TestOtherFiles:
    """Tokenizers and processors name code as well."""

    TOKENIZER = "tokenization_own.OwnTokenizer"

    @pytest.fixture
    def source(self, source: Path) -> Path:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
        (source / "tokenization_own.py").write_text(
            "from transformers import PreTrainedTokenizerFast\n"
            "class OwnTokenizer(PreTrainedTokenizerFast):\n    own = 1\n"
        )
        return source

    @pytest.mark.parametrize("names", [{"AutoTokenizer": [None, TOKENIZER]}, [TOKENIZER, None], [None, TOKENIZER]])
    @pytest.mark.parametrize("format_name", ["hf", "packed", "gptq", "compressed-tensors", "mlc", "gguf"])
    @pytest.mark.parametrize("trusts", [True, False])
    def test_tokenizers(
        self, source: Path, finish: Finish, tmp_path: Path, names: Any, format_name: str, trusts: bool
    ) -> None:
        change(source / "tokenizer_config.json", auto_map=names)
        folder = exported(source, tmp_path / "out", finish, format_name, trusts)
        assert [path.name for path in folder.glob("*.py")] == (["tokenization_own.py"] if trusts else [])
        assert ("Python code for `AutoTokenizer` is left out" in (folder / "README.md").read_text()) is not trusts
        for loads_code in (True, False):
            expected = AutoTokenizer.from_pretrained(source, trust_remote_code=loads_code)
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=loads_code)
            assert hasattr(found, "own") is (trusts and hasattr(expected, "own"))
            assert found("some text")["input_ids"] == expected("some text")["input_ids"]

    @pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json", "generation_config.json"])
    @pytest.mark.parametrize("trusts", [True, False])
    def test_processors_and_sections(
        self, source: Path, finish: Finish, tmp_path: Path, name: str, trusts: bool
    ) -> None:
        (source / "processing_own.py").write_text("class OwnProcessor:\n    pass\n")
        section = {"size": 3, "auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}
        (source / name).write_text(json.dumps(section | {"image_processor": section}))
        folder = exported(source, tmp_path / "out", finish, "hf", trusts)
        expected = section if trusts else {"size": 3}
        assert json.loads((folder / name).read_text()) == expected | {"image_processor": expected}
        assert (folder / "processing_own.py").is_file() is trusts

    @pytest.mark.parametrize("trusts", [True, False])
    def test_a_token_of_that_name_is_no_code(self, source: Path, finish: Finish, tmp_path: Path, trusts: bool) -> None:
        for name in ("vocab.json", "added_tokens.json"):
            (source / name).write_text('{"a": 0, "auto_map": 1}')
        before = {name: (source / name).read_bytes() for name in ("vocab.json", "added_tokens.json", "tokenizer.json")}
        folder = exported(source, tmp_path / "out", finish, "hf", trusts)
        assert {name: (folder / name).read_bytes() for name in before} == before

    @pytest.mark.parametrize("trusts", [True, False])
    def test_files_that_name_no_code_are_copied_byte_by_byte(
        self, source: Path, finish: Finish, tmp_path: Path, trusts: bool
    ) -> None:
        (source / "preprocessor_config.json").write_text('{"size":   3}')
        folder = exported(source, tmp_path / "out", finish, "hf", trusts)
        assert (folder / "preprocessor_config.json").read_text() == '{"size":   3}'


@pytest.mark.parametrize("trusts", [True, False])
def test_code_of_another_repository_is_named_only_if_trusted(
    source: Path, finish: Finish, tmp_path: Path, trusts: bool
) -> None:
    """A repository that transformers asks about only for ``AutoModelForSequenceClassification``, which nothing does."""
    other = {"AutoModelForSequenceClassification": "owner/name--modeling_other.OtherModel"}
    change(source / "config.json", auto_map=other)
    folder = exported(source, tmp_path / "out", finish, "hf", trusts)
    assert json.loads((folder / "config.json").read_text()).get("auto_map") == (other if trusts else None)
    assert not list(folder.glob("*.py"))
