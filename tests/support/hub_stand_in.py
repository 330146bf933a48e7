"""A hub on this machine: what huggingface_hub asks of the real one to list and download a repository."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

__all__ = ["HubStandIn", "hub_stand_in"]


class HubStandIn:
    """Repositories by id, each a table of files; ``gated`` are those whose files nobody may have."""

    def __init__(self) -> None:
        self.repositories: dict[str, Mapping[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of a path."""
        parts = path.partition("?")[0].strip("/").split("/")
        if parts == [""]:
            return 200, {}, b""
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = self.repositories[repository]
        if parts[0] == "api" and parts[4] == "revision":
            return 200, {}, json.dumps({"id": repository, "sha": _commit(files)}).encode()
        if parts[0] == "api":
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": _oid(name)} for name in files]
            return 200, {}, json.dumps(entries).encode()
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        name = "/".join(parts[4:])
        return 200, {"ETag": f'"{_oid(name)}"', "X-Repo-Commit": _commit(files)}, files[name]


def _oid(name: str) -> str:
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()


def _commit(files: Mapping[str, bytes]) -> str:
    return _oid("".join(files))


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._head()

        def do_GET(self) -> None:
            self.wfile.write(self._head())
            if "/resolve/" in self.path:
                hub.fetched.append(self.path.split("/resolve/")[1].partition("/")[2])

        def _head(self) -> bytes:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            return content

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def hub_stand_in(cache: Path) -> Iterator[HubStandIn]:
    """Points huggingface_hub at a hub of its own, with an empty cache."""
    hub = HubStandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        try:
            yield hub
        finally:
            hub.close()
