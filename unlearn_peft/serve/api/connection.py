"""One client's connection: how long each part of a request and its response may take, and how many may be open.

uvicorn bounds the time between two requests alone. A head or a body that never ends, a response that nobody reads, and
sockets that say nothing would each hold a file and memory for ever. A head of thousands of lines, or a body in parts of
a byte, would keep the event loop for long. And who is refused asks again at once: so answers that cost their client
nothing, refusals above all, are sent to each at a steady pace.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..fair_queue import FairQueue
from ..limits import Limits
from ..request import ApiError
from .listening import address_of, most_open

_FULL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\nretry-after: 5\r\n\r\n"
_HEAD_BYTES, _HEAD_LINES = 16_384, 100  # of a request's head; also bytes that may come before it is answered
_LONG_HEAD = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_PARTS, _PART_BYTES = 256, 256  # parts of a body that may be smaller than so many bytes on average
_PACE, _BURST = 0.05, 1.0  # seconds from one free answer to the next, and how many seconds' worth are sent at once
_HEALTH_PACE = 0.005
_GRACE = 2.0  # seconds, beyond those in which the app itself refuses in plain words
_errors = logging.getLogger(f"{__name__}.errors")  # instead of uvicorn's, without its lines on what clients send
_errors.setLevel(logging.ERROR)


def free_answers() -> FairQueue:
    """Return the queue of answers that cost their client nothing, by tenant or, without a known key, by address."""
    return FairQueue(math.inf, per_tenant=1, burst=_BURST)


class _Parser(h11.Connection):
    """h11, without bodies of small parts: each part takes as much time as a large one."""

    _parts = _size = 0  # of this request's body

    def next_event(self) -> Any:
        """Return the next event; see h11 for errors."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._size = 0
        elif isinstance(event, h11.Data):
            self._parts, self._size = self._parts + 1, self._size + len(event.data)
            if self._parts > _PARTS + self._size // _PART_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many small parts")
        return event


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with the bounds of the app's `Limits`; what exceeds them is cut off."""

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)
        self.conn, self.logger = _Parser(h11.SERVER), _errors
        self._limits: Limits = config.app.state.handler.limits
        self._free_answers: FairQueue = config.app.state.free_answers
        self._turn: asyncio.Future[None] | None = None  # of a free answer to this client
        self._respond, self.app = self.app, self._within_limits
        self._reading: str | None = None  # "head" or "body", while one of them is under way
        self._timers = dict[str, asyncio.TimerHandle]()

    @property
    def busy(self) -> bool:
        """Whether a response is under way, or not wholly sent."""
        sending = self.cycle is not None and not self.cycle.response_complete
        return sending or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        if (sock := transport.get_extra_info("socket")) is not None and sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or each small answer waits for 40 ms
        if self._is_one_too_many():
            transport.write(_FULL)
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self.conn.their_state is h11.IDLE:
            head = (self.conn.trailing_data[0] + data).partition(b"\r\n\r\n")[0]
            if len(head) > _HEAD_BYTES or head.count(b"\n") > _HEAD_LINES:
                self.transport.write(_LONG_HEAD)
                self.transport.close()
                return
        super().data_received(data)
        if self.conn.their_state is not h11.SEND_BODY and len(self.conn.trailing_data[0]) > _HEAD_BYTES:
            self.transport.abort()  # it sends further requests before it has an answer
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where what comes is no HTTP; a response may be under way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Called when a response was written; the next request begins with its head's first byte."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._set_reading(None)

    def pause_writing(self) -> None:
        """Called by asyncio: the client takes less than is sent."""
        super().pause_writing()
        self._start("stall", self._limits.stall_seconds)

    def resume_writing(self) -> None:
        """Called by asyncio."""
        super().resume_writing()
        self._stop("stall")

    def timeout_keep_alive_handler(self) -> None:
        """Called where no further request comes; `close` would wait for a client that does not read."""
        if self.busy:
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        for name in list(self._timers):
            self._stop(name)
        if self._turn is not None:
            self._turn.cancel()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        return False  # HTTP/1.1 is all that there is

    def _is_one_too_many(self) -> bool:
        limit = most_open(self._limits)
        address = address_of(self.client)
        of_this = sum(address_of(getattr(one, "client", None)) == address for one in self.connections)
        per_address = self._limits.per_address
        return len(self.connections) > limit or of_this > (limit // 4 if per_address is None else per_address)

    def _watch(self) -> None:
        """Bound the time of a head or body that is under way; more bytes of it give no more time."""
        if not self.transport.is_closing():
            self._set_reading({h11.IDLE: "head", h11.SEND_BODY: "body"}.get(self.conn.their_state))

    def _set_reading(self, part: str | None) -> None:
        if part != self._reading:
            self._stop("reading")
            self._reading = part
            if part is not None:
                limits = self._limits
                self._start("reading", limits.header_seconds if part == "head" else limits.body_seconds + _GRACE)

    def _start(self, name: str, seconds: float) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    async def _within_limits(self, scope: Any, receive: Any, send: Any) -> None:
        """The app, which may take `Limits.seconds` for everything from a request's head to the last byte sent."""

        async def send_in_turn(message: Any) -> None:
            if message["type"] == "http.response.start":
                if scope["path"] == "/healthz":
                    await self._wait_for_turn(f"health {address_of(self.client)}", _HEALTH_PACE)
                elif message["status"] >= 400 or scope["method"] != "POST":
                    client = scope["state"].get("tenant") or f"address {address_of(self.client)}"
                    await self._wait_for_turn(client, _PACE)
            await send(message)

        timer = self.loop.call_later(self._limits.seconds + _GRACE, self.transport.abort)
        try:
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                message = "a request has Content-Length and Transfer-Encoding: expected one of them"
                body = ApiError(400, message, code="invalid_framing").body
                await JSONResponse(body, 400, {"connection": "close"})(scope, receive, send_in_turn)
            else:
                await self._respond(scope, receive, send_in_turn)
        finally:
            timer.cancel()

    async def _wait_for_turn(self, client: str, pace: float) -> None:
        """Wait until a client may have another free answer, or has gone."""
        if self.transport.is_closing():
            return
        self.flow.resume_reading()  # uvicorn reads nothing after a request, and so would not see it go
        self._turn = asyncio.ensure_future(self._free_answers.acquire(client))
        await asyncio.wait({self._turn})
        if not self._turn.cancelled():
            self._free_answers.charge(client, pace)
            self._free_answers.release(client)
