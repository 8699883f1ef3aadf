"""The web server of the demo's pictures, on this machine alone, while a download runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from neuclip_scale.reproduce.demo_list import PICTURES, Served
from neuclip_scale.reproduce.errors import ReproduceError

_STATUS = {"not found": 404, "gone": 410, "broken": 500}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    pictures: dict[str, Path]
    faults: dict[str, str]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        """img2dataset's own log tells what came."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        fault = self.server.faults.get(name, "")
        if name not in self.server.pictures or fault in _STATUS:
            self._send(_STATUS.get(fault, 404), "text/plain", b"no such picture")
        elif fault == "page":
            self._send(200, "text/html", b"<!DOCTYPE html><title>parked</title>")
        else:
            other = next(iter(self.server.pictures))
            body = self.server.pictures[other if fault == "changed" else name].read_bytes()
            self._send(200, "image/jpeg", body[: len(body) // 2] if fault == "cut" else body, len(body))

    def _send(self, status: int, kind: str, body: bytes, told: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if told is None else told))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[None]:
    """Serve what `write_demo_list` wrote into `folder`; raises `ReproduceError` where its port is taken."""
    served = Served.read(folder)
    try:
        server = _Server(("127.0.0.1", served.port), _Handler)
    except OSError as error:
        raise ReproduceError(
            f"port {served.port}, which stands in the list's urls, cannot be listened at ({error.strerror}). Wait, or "
            f"remove {folder} and begin anew."
        ) from error
    # Only what was listed can be asked for: no path of a request ever reaches the disk.
    server.pictures = {path.name: path for path in sorted((folder / PICTURES).iterdir())}
    server.faults = served.faults
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
