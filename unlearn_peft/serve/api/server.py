"""Run the app with uvicorn, and end it gently: SIGTERM lets running requests finish, and refuses new ones meanwhile."""

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
    """A server that drains: from SIGTERM on, new requests get 503 with Retry-After and /readyz says so.

    It ends when no answer runs any more, or after `limits.drain_seconds`. A second Ctrl-C ends it at once.
    """

    def __init__(self, app: FastAPI, *, ready: Callable[[str], None] = lambda url: None) -> None:
        # clients must be the first to let an idle connection go, or one of their requests meets a closed one; most of
        # them (httpx) do after 5 s, proxies after 60
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=2, timeout_keep_alive=75, lifespan="on"
        )
        super().__init__(config)
        self.front: RequestHandler = app.state.front
        self._ready, self._told, self._deadline = ready, False, 0.0

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; returns whether to end."""
        if not self._told:
            self._told = True
            self._ready(self.url)
        ends = await super().on_tick(counter)
        if not ends or self.force_exit:
            return ends
        if not self.front.draining:
            self.front.draining = True
            self._deadline = time.monotonic() + self.front.limits.drain_seconds
            logger.warning("shutting down: %d answers are still under way", self.front.active)
        return self.front.active == 0 or time.monotonic() > self._deadline

    @property
    def url(self) -> str:
        """Where it listens; port 0 has become a real one."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; before a model is loaded, so that a port that is taken is told at once.

    Raises:
        UnlearnError: if the port is taken, or not allowed.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UnlearnError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from None
