"""Run the app with uvicorn; on SIGTERM, running requests finish and new ones are refused."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ...errors import UnlearnError
from ..handler import RequestHandler

logger = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """A server that drains: after SIGTERM, new requests get 503 with Retry-After and /readyz says so.

    It ends when no answer runs any more, or after `limits.drain_seconds`; a second Ctrl-C ends it at once.
    """

    def __init__(self, app: FastAPI, *, ready: Callable[[str], None] = lambda url: None) -> None:
        # keep alive for longer than clients (httpx: 5 s) and proxies (60 s), or a request meets a closed connection
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=2, timeout_keep_alive=75, lifespan="on"
        )
        super().__init__(config)
        self.handler: RequestHandler = app.state.handler
        self._ready, self._announced, self._deadline = ready, False, 0.0

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; returns whether to end."""
        if not self._announced:
            self._announced = True
            self._ready(self.url)
        ends = await super().on_tick(counter)
        if not ends or self.force_exit:
            return ends
        if not self.handler.draining:
            self.handler.draining = True
            self._deadline = time.monotonic() + self.handler.limits.drain_seconds
            logger.warning("shutting down: %d answers are still under way", self.handler.active)
        return self.handler.active == 0 or time.monotonic() > self._deadline

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; call it before a model is loaded, so that a port in use is reported at once.

    Raises:
        UnlearnError: the port is in use, or not allowed.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UnlearnError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from None
