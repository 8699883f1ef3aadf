"""A Hugging Face hub of one machine: serves folders as data sets over HTTP, as far as a download needs it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4


class HubServer(ThreadingHTTPServer):
    """`root`/OWNER/NAME are the data sets; `requested` holds the files that were asked for, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requested: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve_hub(root: Path) -> Iterator[HubServer]:
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, send_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            self._answer_api(self.server.root / parts[2] / parts[3], parts[4:])
        elif len(parts) > 5 and parts[0] == "datasets" and parts[3] == "resolve":
            self._answer_file(self.server.root.joinpath(parts[1], parts[2], *parts[5:]), send_body)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _answer_api(self, folder: Path, rest: list[str]) -> None:
        if not folder.is_dir():
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if rest[:1] == ["tree"]:
            entries = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            return
        info = {
            "id": "/".join(folder.parts[-2:]),
            "sha": COMMIT,
            "siblings": [{"rfilename": str(path.relative_to(folder))} for path in files],
        }
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, path: Path, send_body: bool) -> None:
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if not send_body:
            self._send(200, b"", headers | {"Content-Length": str(len(data))})
            return
        self.server.requested.append(path.name)
        self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
