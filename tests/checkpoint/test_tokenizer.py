"""The tokenizer of a folder: as transformers opens it, or the reason why it does not open."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from omniquant_pl.checkpoint.tokenizer import open_tokenizer
from omniquant_pl.errors import ConfigurationError
from tiny_tokenizers import byte_level

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3MoeConfig, Gemma2Config, OPTConfig, Phi3Config]
PIECES = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"
"""The beginning of a SentencePiece model."""


@pytest.fixture(params=FAMILIES, ids=lambda config: config.model_type)
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model folder of a family without a tokenizer."""
    config: PretrainedConfig = request.param()
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def folder(bare: Path) -> Path:
    """The same with a tokenizer."""
    byte_level().save_pretrained(bare)
    return bare


def problem_of(folder: Path, trusted: bool = False) -> str:
    found = open_tokenizer(folder, trusted)
    assert found.tokenizer is None
    assert found.problem is not None
    assert "\n" not in found.problem
    return found.problem


def test_opens_as_transformers_does(folder: Path) -> None:
    found = open_tokenizer(folder, trust_remote_code=False)
    assert found.problem is None
    text = "Once upon a time <tool> é"
    assert found.needed("key", "")(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("config", [None, "{}", '{"tokenizer_class": "GPT2Tokenizer"}'])
def test_none(bare: Path, config: str | None) -> None:
    """Of some families transformers makes up a tokenizer that encodes every text as nothing."""
    if config is not None:
        (bare / "tokenizer_config.json").write_text(config)
    found = open_tokenizer(bare, trust_remote_code=False)
    assert found.tokenizer is None
    assert found.problem is None
    with pytest.raises(ConfigurationError, match=r"^key: .* has no tokenizer to do that with$"):
        found.needed("key", "to do that with")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    assert problem_of(folder).startswith(f"{name} is a Git LFS pointer")
    assert "git lfs pull" in problem_of(folder)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "tokenizer.model"])
def test_git_lfs_pointer_of_a_vocabulary(bare: Path, name: str) -> None:
    (bare / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (bare / "merges.txt").write_text("a b\n")
    (bare / name).write_text(POINTER)
    assert problem_of(bare).startswith(f"{name} is a Git LFS pointer")


def test_pointer_that_is_not_read(folder: Path) -> None:
    (folder / "tokenizer.model").write_text(POINTER)
    assert open_tokenizer(folder, trust_remote_code=False).tokenizer is not None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("cut", [lambda text: text[: len(text) // 2], lambda _: ""], ids=["half", "empty"])
def test_cut_json(folder: Path, name: str, cut: Callable[[str], str]) -> None:
    path = folder / name
    path.write_text(cut(path.read_text() if path.exists() else '{"bos_token": "<s>"}'))
    assert problem_of(folder).startswith(f"{name} is not JSON (")
    assert " column " in problem_of(folder)  # where


def test_json_of_another_kind(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "KeyError" in problem_of(folder)


def test_merges_of_another_vocabulary(bare: Path) -> None:
    """The tokenizers library panics, or the family does not read these files."""
    (bare / "vocab.json").write_text('{"a": 0, "b": 1, "h": 2}')
    (bare / "merges.txt").write_text("#version: 0.2\na b\n")
    problem_of(bare)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_sentencepiece_is_not_installed(
    bare: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for package in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, package, None)
    (bare / name).write_bytes(PIECES)
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    message = f"{name} needs packages that are not installed, sentencepiece, protobuf: "
    assert problem_of(bare) == message + "pip install 'omniquant-pl[tokenizers]'"
    assert capfd.readouterr().err == ""
    assert caplog.text == ""


def test_tiktoken_is_not_installed(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    (bare / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert problem_of(bare).startswith("tokenizer.model needs packages that are not installed, tiktoken: pip install")


def test_sentencepiece(tmp_path: Path) -> None:
    pieces = pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install 'omniquant-pl[tokenizers]'")
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time there was a word, and a word was there upon a time\n" * 20)
    pieces.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    reference = pieces.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = open_tokenizer(tmp_path, trust_remote_code=False).needed("key", "")
    text = "there was a time"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    whole = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2] + b"\xff" * 50)
    assert problem_of(tmp_path) == "tokenizer.model is no SentencePiece model; is the download complete? Fetch it again"


class TestCode:
    """A tokenizer that is code of its own."""

    @pytest.fixture
    def coded(self, tmp_path: Path) -> Path:
        LlamaConfig().save_pretrained(tmp_path)
        config = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    def test_not_trusted(self, coded: Path) -> None:
        (coded / "tokenization_own.py").write_text("raise SystemExit('it runs')\n")
        (coded / "own.tiktoken").write_text("IQ== 0\n")
        assert "set model.trust_remote_code to true" in problem_of(coded)

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("import no_such_package\n", "no_such_package"),
            ("def f(:\n", "SyntaxError"),
            ("class Own:\n    pass\n", "AttributeError"),
            (None, "tokenization_own.py"),
        ],
    )
    def test_does_not_run(self, coded: Path, code: str | None, message: str) -> None:
        if code is not None:
            (coded / "tokenization_own.py").write_text(code)
        assert message in problem_of(coded, trusted=True)


def test_folder_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    found = open_tokenizer(tmp_path / "owner" / "name", trust_remote_code=False)
    assert (found.tokenizer, found.problem) == (None, None)
