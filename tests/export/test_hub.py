"""Uploads to an endpoint of our own that speaks the hub's HTTP, and what is said when it refuses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HubRepository


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits as the hub does; everything is a regular file to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        self.refuses_with: int | None = None
        self.card_errors: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> dict[str, bytes]:
        """What the last commit has put into the repository."""
        entries = (entry["value"] for entry in self.commits[-1] if entry["key"] == "file")
        return {entry["path"]: base64.b64decode(entry["content"]) for entry in entries}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses_with is not None:
            self.answer({"error": "because it says so"}, self.server.refuses_with)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/owner/name", "name": "owner/name", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": self.server.card_errors, "warnings": []}, 400 if self.server.card_errors else 200)
        elif self.path == "/api/models/owner/name/preupload/main":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path == "/api/models/owner/name/commit/main":
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{self.server.url}/owner/name/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"error": f"nobody expected {self.path}"}, 404)

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def finished(llama: Path, token_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a finished run."""
    calibration, evaluation = token_files
    folder = tmp_path_factory.mktemp("run")
    data = [f"--data.dataset={calibration}", "--data.samples=6", f"--data.evaluation=[{evaluation}]"]
    trainer = ["--trainer.max_epochs=0", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    options = [*data, *trainer, "--progress.quiet=true", "--export.format=null"]
    run(["fit", "--config=w4a16.yaml", f"--model.path={llama}", *options])
    return folder / "config.yaml"


@pytest.fixture
def arguments(finished: Path, tmp_path: Path) -> list[str]:
    """Of an export to `out`."""
    return ["export", f"--config={finished}", "--format=packed", f"--output={tmp_path / 'out'}"]


def test_every_file_arrives(hub: Hub, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([*arguments, "--push=owner/name", "--private=true"])
    assert hub.files() == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= set(hub.files())
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("owner", "name")
    assert created["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_of_a_test"}
    assert f"uploaded: {hub.url}/owner/name" in capsys.readouterr().out


def test_without_push_nothing_is_asked(hub: Hub, arguments: list[str]) -> None:
    run(arguments)
    assert hub.created == []


class TestRefused:
    """In one line, and before anything is written."""

    def test_nobody_is_logged_in(
        self, hub: Hub, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(ConfigurationError, match=r"^push: nobody is logged in .* set HF_TOKEN$"):
            run([*arguments, "--push=owner/name"])
        assert not (tmp_path / "out").exists()
        assert hub.tokens == set()

    @pytest.mark.parametrize(
        ("status", "message"),
        [
            (401, "the hub answered 401: the token is missing or not valid; run hf auth login, or set HF_TOKEN"),
            (403, "the hub answered 403: the token may not write to owner/name"),
            (422, "the hub answered 422: because it says so"),
        ],
    )
    def test_token(self, hub: Hub, arguments: list[str], tmp_path: Path, status: int, message: str) -> None:
        hub.refuses_with = status
        with pytest.raises(ConfigurationError) as caught:
            run([*arguments, "--push=owner/name"])
        assert str(caught.value).startswith(f"push: {message}")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["name", "a/b/c", "owner/na me", "owner/--"])
    def test_name(self, hub: Hub, name: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^push: "):
            HubRepository(name)
        assert hub.created == []

    def test_nobody_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        with pytest.raises(ConfigurationError, match=r"^push: the hub cannot be reached: "):
            HubRepository("owner/name")

    def test_a_card_that_the_hub_does_not_take(self, hub: Hub, tmp_path: Path) -> None:
        repository = HubRepository("owner/name")
        hub.card_errors = [{"message": "license is none"}]
        (tmp_path / "README.md").write_text("---\nlicense: none\n---\n")
        with pytest.raises(ConfigurationError, match=r"^push: .*license is none"):
            repository.upload(tmp_path)
