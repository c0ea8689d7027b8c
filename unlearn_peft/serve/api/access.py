"""Who asks, and whether still: the key, the address and the id of a request; and the access log, a JSON line for each
response.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request

from ...errors import printable
from ..audit import AuditLog
from ..handler import RequestHandler
from ..request import ApiError, Call

_CALL = "unlearn_peft.call"  # in an ASGI scope
_UNLOGGED = ("/healthz", "/readyz", "/metrics")
_MAX_PATH = 200
T = TypeVar("T")


async def identify(handler: RequestHandler, request: Request, scope: str | None = None) -> Call:
    """Find out whose request this is, see `RequestHandler.identify`; `scope` is what its key must allow."""
    client = printable(request.client.host, lines=False)[:64] if request.client else None
    call = await handler.identify(request.headers.get("authorization"), client, scope)
    request.scope[_CALL] = call
    request.state.tenant = call.tenant  # its free answers wait for this tenant's turn, not for its address's
    return call


async def while_connected(request: Request, awaitable: Awaitable[T]) -> T:
    """Await something, and cancel it when the client goes away.

    Raises:
        ApiError: 499 when it has.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(awaitable), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client has gone", code="client_gone")
        return await work
    finally:
        for task in (work, watch):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class AccessLog:
    """ASGI middleware that writes a line when a response has ended; health and metrics are left out.

    The path is the request's, without its query. A line that cannot be written is lost; `AuditLog` says so.
    """

    def __init__(self, app: Any, log: AuditLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the app answer, and write the line."""
        if scope["type"] != "http" or scope["path"] in _UNLOGGED:
            await self._app(scope, receive, send)
            return
        began, status, size, request = time.monotonic(), 0, 0, None

        async def sending(message: Any) -> None:
            nonlocal status, size, request
            if message["type"] == "http.response.start":
                status = message["status"]
                request = dict(message.get("headers", ())).get(b"x-request-id")
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            call: Call | None = scope.get(_CALL)
            client = scope.get("client")
            line = {
                "id": call.id if call else request.decode() if request else None,
                "client": call.client if call else printable(client[0], lines=False)[:64] if client else None,
                "tenant": call.tenant if call else None, "key": call.key_id if call else None,
                "method": scope["method"], "path": printable(scope["path"], lines=False)[:_MAX_PATH], "status": status,
                "bytes": size, "seconds": round(time.monotonic() - began, 4),
            }  # fmt: skip
            self._log.write_or_log("access", **line)
