"""A real HTTP server over a folder, with ranges, and with faults that a test plants."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Shelf:
    """What is served, how often each name was asked for, and which faults wait."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.resets: Counter[str] = Counter()
        """Answers that will be cut in the middle, by name."""
        self.failures: Counter[str] = Counter()
        """Answers that will be 503, by name."""
        self.delay = 0.0
        self.address = ""


@contextmanager
def web_server(folder: Path) -> Iterator[Shelf]:
    """Serve `folder` on a free port of this machine."""
    shelf = Shelf(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            name = self.path.lstrip("/")
            path = shelf.folder / name
            if with_body:
                shelf.asked[name] += 1
                time.sleep(shelf.delay)
            if shelf.failures[name] > 0:
                shelf.failures[name] -= 1
                self.send_error(503)
                return
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            first, last = 0, len(data) - 1
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(last, int(asked[2] or last))
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:x}"')
            self.end_headers()
            if with_body:
                body = data[first : last + 1]
                if shelf.resets[name] > 0:
                    shelf.resets[name] -= 1
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.connection.close()
                    return
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    shelf.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield shelf
    finally:
        server.shutdown()
        server.server_close()
