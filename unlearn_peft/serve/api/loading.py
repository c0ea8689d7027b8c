"""What is answered while the model loads: that the process lives, and that it is not ready."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..request import ApiError

_HEAD_SECONDS = 5.0  # for a request's head, after which its thread ends
_MAX_THREADS = 32


class _Answer(BaseHTTPRequestHandler):
    """200 for /healthz, 503 for everything else; no body is read, and the connection is closed."""

    timeout = _HEAD_SECONDS

    def _answer(self) -> None:
        alive = self.path == "/healthz"
        refusal = ApiError(503, "the model is still loading", code="loading")
        body: Any = {"status": "ok"} if alive else refusal.body
        if self.path == "/readyz":
            body = {"status": "not ready", "problem": "the model is still loading", "policy_problem": None}
        content = json.dumps(body).encode()
        self.send_response(200 if alive else 503)
        headers = {} if alive else refusal.headers
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 1

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.getsockname()[:2], _Answer, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self._places = threading.BoundedSemaphore(_MAX_THREADS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""


@contextmanager
def answering(listening: socket.socket) -> Iterator[None]:
    """Answer what comes to a listening socket until the block ends; the socket stays open, for the server itself."""
    server = _Server(listening)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
