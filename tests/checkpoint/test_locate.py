"""What may stand in ``model.path``."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from hub_stand_in import HubStandIn, hub_stand_in
from hub_trees import CODE, NEEDED, UNNEEDED
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_stand_in(tmp_path / "cache") as found:
        yield found


def contents(repository: str) -> dict[str, bytes]:
    """A repository's files; the index names its shards, and nothing else has a sensible content."""
    names = [*NEEDED[repository], *CODE.get(repository, []), *UNNEEDED[repository]]
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    index = json.dumps({"weight_map": {f"tensor.{name}": name for name in shards}})
    return {name: index.encode() if name == "model.safetensors.index.json" else name.encode() for name in names}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("repository", list(NEEDED))
def test_what_is_downloaded(hub: HubStandIn, repository: str, with_code: bool) -> None:
    hub.repositories[f"owner/{repository}"] = contents(repository)
    expected = sorted(NEEDED[repository] + (CODE.get(repository, []) if with_code else []))
    assert files_of(locate_model(f"owner/{repository}", with_code)) == expected
    assert sorted(hub.fetched) == expected  # each once


@pytest.mark.parametrize("repository", list(NEEDED))
def test_the_top_of_a_repository_by_allowed_patterns_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str
) -> None:
    def download(_: str, allow_patterns: list[str], **__: Any) -> str:
        tops = [(name, content) for name, content in contents(repository).items() if "/" not in name]
        for name, content in filter_repo_objects(tops, allow_patterns=allow_patterns, key=lambda file: file[0]):
            (tmp_path / "work" / name).write_bytes(content)
        return str(tmp_path / "work")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert files_of(locate_model("owner/name")) == sorted(name for name in NEEDED[repository] if "/" not in name)


class TestHubThatDoesNotAnswer:
    def test_what_is_cached_is_used(self, hub: HubStandIn) -> None:
        hub.repositories["owner/llama-3"] = contents("llama-3")
        before = locate_model("owner/llama-3")
        hub.close()
        started = time.monotonic()
        assert locate_model("owner/llama-3") == before
        assert time.monotonic() - started < 5

    def test_a_part_that_is_cached_is_used_with_a_warning(
        self, hub: HubStandIn, caplog: pytest.LogCaptureFixture
    ) -> None:
        hub.repositories["owner/gpt-2"] = contents("gpt-2")
        folder = locate_model("owner/gpt-2")
        (folder / "README.md").unlink()
        hub.close()
        assert locate_model("owner/gpt-2") == folder
        assert "1 file(s) are missing (README.md)" in caplog.text

    def test_what_is_not_cached(self, hub: HubStandIn) -> None:
        hub.close()
        started = time.monotonic()
        with pytest.raises(ConfigurationError) as caught:
            locate_model("owner/gpt-2")
        assert time.monotonic() - started < 5
        message = str(caught.value)
        assert message.startswith("model.path: there is no folder 'owner/gpt-2', and it cannot be downloaded: ")
        assert re.search(rf"{hub.address} does not answer \(.*refused.*\), and it is not in the cache", message)
        assert "\n" not in message

    def test_one_that_accepts_and_stays_silent(self, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("omniquant_pl.checkpoint.hub._PATIENCE", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(ConfigurationError, match=r"does not answer \(.*timed out\)"):
                locate_model("owner/gpt-2")

    def test_offline_mode(self, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repositories["owner/gpt-2"] = contents("gpt-2")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
            locate_model("owner/gpt-2")
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert not hub.fetched

    def test_offline_mode_is_left_as_it_was(self, hub: HubStandIn) -> None:
        hub.close()
        with pytest.raises(ConfigurationError):
            locate_model("owner/gpt-2")
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


class TestHubThatRefuses:
    def test_no_such_repository(self, hub: HubStandIn) -> None:
        with pytest.raises(ConfigurationError, match=rf"there is no model {hub.address}/owner/gone, or it is private"):
            locate_model("owner/gone")

    def test_gated(self, hub: HubStandIn) -> None:
        hub.repositories["owner/gpt-2"] = contents("gpt-2")
        hub.gated.add("owner/gpt-2")
        with pytest.raises(ConfigurationError) as caught:
            locate_model("owner/gpt-2")
        assert f"accept its licence on {hub.address}/owner/gpt-2, then run hf auth login" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_no_id(self, hub: HubStandIn) -> None:
        with pytest.raises(ConfigurationError, match=r"^model\.path: .*'owner/na me'"):
            locate_model("owner/na me")


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError, HFValidationError, OSError])
def test_hub_that_does_not_deliver(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise failure("no such\nthing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigurationError, match=r"^model\.path: .*'no/where'.*no such thing$"):
        locate_model("no/where")


def test_a_path_that_means_the_same_in_any_folder(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models/llama").mkdir(parents=True)
    found = from_any_folder("models/llama")
    assert Path(found) == tmp_path / "work" / "models" / "llama"
    assert from_any_folder(found) == found
    assert [from_any_folder(path) for path in ("small", "owner/name", "")] == ["small", "owner/name", ""]
