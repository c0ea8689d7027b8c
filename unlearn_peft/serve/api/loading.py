"""What is answered while the model loads: that the process lives, and that it is not ready."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...errors import UnlearnError
from ..request import ApiError
from .listening import address_of

_HEAD_SECONDS = 5.0  # for a request's head, after which its thread ends
_MAX_THREADS, _PER_ADDRESS = 32, 8


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

    def __init__(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        super().__init__(listening.getsockname()[:2], _Answer, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self._lock, self._taken = threading.Lock(), Counter[str]()  # threads, by address

    def get_request(self) -> tuple[Any, Any]:
        request, address = super().get_request()
        if self._tls is not None:  # with the first read, in the request's own thread
            request.settimeout(_HEAD_SECONDS)
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        address = address_of(client_address)
        with self._lock:
            has_place = self._taken.total() < _MAX_THREADS and self._taken[address] < _PER_ADDRESS
            self._taken[address] += has_place
        if has_place:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._taken -= Counter([address_of(client_address)])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of ours."""


def tls_context(certificates: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return what TLS needs, or None without certificates.

    Raises:
        UnlearnError: they cannot be read, or do not fit.
    """
    if certificates is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificates, key, password=lambda: "")  # or OpenSSL would ask for one
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or error.strerror
        raise UnlearnError(f"cannot use --ssl-certfile {certificates} with its key: {reason}") from None
    return context


@contextmanager
def answering(listening: socket.socket, tls: ssl.SSLContext | None = None) -> Iterator[None]:
    """Answer what comes to a listening socket until the block ends; the socket stays open, for the server itself."""
    server = _Server(listening, tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
