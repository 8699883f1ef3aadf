"""A real web server on this machine for many hosts, with faults planted by url."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NORMAL, HANG, RESET, CUT, SILENT, TRICKLE = "normal", "hang", "reset", "cut", "silent", "trickle"


@dataclass(frozen=True)
class Answer:
    """What the server does with a request."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    conduct: str = NORMAL
    """`hang`: no answer before the server ends; `trickle`: hangs in the middle of the body; `reset`: the connection is
    torn down; `cut`: half of the body; `silent`: closed without an answer."""


@dataclass(frozen=True)
class Ports:
    """Where the hosts are."""

    http: int
    https: int
    closed: int
    """Nothing listens there."""
    deaf: int
    """Connections are never accepted."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    answers: Mapping[str, Answer]
    ended: threading.Event
    tls: ssl.SSLContext | None = None

    def finish_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        if self.tls is not None:  # here, in the request's own thread: a client that hangs up holds up no other
            request = self.tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients of planted faults hang up in every way


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        scheme = "https" if self.server.tls is not None else "http"
        url = f"{scheme}://{self.headers['Host']}{self.path}"
        answer = self.server.answers.get(url, Answer(b"no such picture", 404))
        self.close_connection = True
        if answer.conduct == HANG:
            self.server.ended.wait(60)
        elif answer.conduct == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close(), self.wfile.close(), self.connection.close()
        elif answer.conduct != SILENT:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        whole = answer.conduct == NORMAL
        self.wfile.write(answer.body if whole else answer.body[: len(answer.body) // 2])
        self.wfile.flush()
        if answer.conduct == TRICKLE:
            self.server.ended.wait(60)


@contextmanager
def planted_server(answers: Mapping[str, Answer], tls: ssl.SSLContext) -> Iterator[Ports]:
    """Serve `answers` by url until the block ends."""
    with ExitStack() as stack:
        ended = threading.Event()
        ports = []
        for context in (None, tls):
            server = _Server(("127.0.0.1", 0), _Handler)
            server.answers, server.ended, server.tls = answers, ended, context
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            ports.append(server.server_address[1])
        closed = stack.enter_context(socket.socket())
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else takes it, but not listening
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(3):  # they fill its queue: the kernel drops whatever comes later
            knock = stack.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(deaf.getsockname())
        stack.callback(ended.set)
        yield Ports(ports[0], ports[1], closed.getsockname()[1], deaf.getsockname()[1])
