"""Run the app with uvicorn; on SIGTERM, running requests finish and new ones are refused."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..handler import RequestHandler
from .connection import Connection
from .listening import Listening

logger = logging.getLogger(__name__)
_SEND_SECONDS = 2.0  # for what is generated already, after SIGTERM


class HttpServer(uvicorn.Server):
    """A server that drains: after SIGTERM, new requests get 503 with Retry-After and /readyz says so.

    It ends when no answer runs any more, or after `limits.drain_seconds`, and then cuts off who does not read; a second
    Ctrl-C ends it at once. `ssl` are uvicorn's options of TLS.
    """

    def __init__(self, app: FastAPI, *, ready: Callable[[str], None] = lambda url: None, **ssl: Any) -> None:
        self.handler: RequestHandler = app.state.handler
        config = uvicorn.Config(
            app, log_level="warning", http=Connection, ws="none", loop="asyncio",  # which asks `Listening` itself
            lifespan="on", timeout_graceful_shutdown=2, timeout_keep_alive=self.handler.limits.idle_seconds, **ssl,
        )  # fmt: skip
        super().__init__(config)
        self._ready, self._announced, self._deadline = ready, False, 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn: begin to accept."""
        for each in sockets or ():
            if isinstance(each, Listening):
                each.limits = self.handler.limits
        await super().startup(sockets)

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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when nothing is generated any more: send what is left, to those that take it."""
        deadline = time.monotonic() + _SEND_SECONDS
        while (busy := self._busy()) and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.05)
        for connection in busy:
            connection.transport.abort()  # uvicorn would cancel its task, and log that as a crash
        await super().shutdown(sockets)

    def _busy(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection) and one.busy]

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http{'s' if self.config.is_ssl else ''}://{f'[{host}]' if ':' in host else host}:{port}"
