"""What may stand in ``model.path``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from omniquant_pl.checkpoint import embedded_models, from_any_folder, locate, locate_model
from omniquant_pl.errors import ConfigurationError


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that comes with two models."""
    for name in ("small", "large", "no-model"):
        (tmp_path / "models" / name).mkdir(parents=True)
    for name in ("small", "large"):
        (tmp_path / "models" / name / "config.json").write_text("{}")
    monkeypatch.setattr(locate, "_EMBEDDED", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def no_hub(*_: Any, **__: Any) -> str:
    raise AssertionError("the hub was asked")


def test_embedded_names(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    assert embedded_models() == ("large", "small")
    assert locate_model("small") == embedded / "small"


def test_folder_comes_before_an_embedded_model(embedded: Path) -> None:
    Path("small").mkdir()
    assert locate_model("small").resolve() == Path("small").resolve()


def test_folders_are_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    Path("models/llama").mkdir(parents=True)
    assert locate_model("models/llama") == Path("models/llama")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llama").mkdir()
    assert locate_model("~/llama") == tmp_path / "llama"


@pytest.mark.parametrize("path", ["medium", "./a/b", "/a/b", "a/b/c", "~/b", "../b", ""])
def test_neither(embedded: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    with pytest.raises(ConfigurationError, match=r"^model\.path: ") as caught:
        locate_model(path)
    assert repr(path) in str(caught.value)
    assert "large, small" in str(caught.value)


@pytest.mark.parametrize("with_code", [False, True])
def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_code: bool) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in allow_patterns)
        assert ("*.py" in allow_patterns) == with_code
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("meta-llama/Llama-2-7b-hf", with_code) == tmp_path
    assert asked == ["meta-llama/Llama-2-7b-hf"]


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError, HFValidationError, OSError])
def test_hub_that_does_not_deliver(monkeypatch: pytest.MonkeyPatch, failure: type[Exception]) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise failure("no such thing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigurationError, match=r"^model\.path: .*'no/where'.*no such"):
        locate_model("no/where")


def test_a_path_that_means_the_same_in_any_folder(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models/llama").mkdir(parents=True)
    found = from_any_folder("models/llama")
    assert Path(found) == tmp_path / "work" / "models" / "llama"
    assert from_any_folder(found) == found
    assert [from_any_folder(path) for path in ("small", "owner/name", "")] == ["small", "owner/name", ""]
