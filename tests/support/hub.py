"""A model hub on this machine: the part of the Hugging Face hub's API that downloads ask for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 16


@dataclass
class Hub:
    """One repository, whose files are those of a folder. Downloads of weights stop half-way until
    `let_go` is set."""

    folder: Path
    repository: str
    url: str = ""
    let_go: threading.Event = field(default_factory=threading.Event)

    def files(self) -> list[Path]:
        return [file for file in sorted(self.folder.rglob("*")) if file.is_file()]

    def entries(self) -> list[dict[str, Any]]:
        """As the hub lists them."""
        return [
            {
                "type": "file",
                "path": file.relative_to(self.folder).as_posix(),
                "size": file.stat().st_size,
                "oid": etag(file),
            }
            for file in self.files()
        ]


def point_to(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the hub's library ask this one."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        served.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub(folder: Path, repository: str) -> Iterator[Hub]:
    """Serve a folder as a repository at `COMMIT`."""
    served = Hub(folder, repository)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, content: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(ConnectionError):  # the client has ended
                    self.send(content, slow=len(content) > PIECE)

        def send(self, content: bytes, *, slow: bool) -> None:
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.wfile.flush()
            if slow:
                served.let_go.wait()
            self.wfile.write(content[half:])

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api, resolve = f"/api/models/{repository}", f"/{repository}/resolve/{COMMIT}/"
            if path == f"{api}/tree/{COMMIT}":
                self.answer(json.dumps(served.entries()).encode(), Content_Type="application/json")
            elif path == f"{api}/revision/{COMMIT}":
                siblings = [{"rfilename": entry["path"]} for entry in served.entries()]
                about = {"id": repository, "sha": COMMIT, "siblings": siblings}
                self.answer(json.dumps(about).encode(), Content_Type="application/json")
            elif (
                path.startswith(resolve) and (file := folder / path.removeprefix(resolve)).is_file()
            ):
                self.answer(file.read_bytes(), ETag=f'"{etag(file)}"', X_Repo_Commit=COMMIT)
            else:
                self.send_error(404)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        served.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
