"""The HTTP side: OpenAI's routes, health, metrics. Bodies come in, JSON or a stream of events goes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from ..audit import AuditLog
from ..engine.base import Engine, TextChunk
from ..handler import RequestHandler, as_api_error
from ..limits import LOOPBACK, Limits
from ..policy.policy import PolicySource
from ..request import ApiError, Call, ParsedRequest
from .playground import Playground, add_playground
from .requests import read_request
from .responses import Answer, ResponseFormat

Pieces = AsyncGenerator[tuple[int, TextChunk], None]


def create_app(
    engine: Engine,
    policies: PolicySource,
    *,
    limits: Limits | None = None,
    audit: AuditLog | None = None,
    open_tenant: str | None = None,
    playground: Playground | None = None,
) -> FastAPI:
    """Return the server as an ASGI app, its `RequestHandler` (see there for the arguments) as `app.state.front`.

    Without a `playground` there is no page.
    """
    front = RequestHandler(engine, policies, limits=limits, audit=audit, open_tenant=open_tenant)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await front.close()

    app = FastAPI(title="unlearn-peft", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.front = front
    if open_tenant is not None:  # no key keeps web pages out that let their own name resolve to this machine
        hosts = [f"[{name}]" if ":" in name else name for name in LOOPBACK]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Any) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def wrong_route(_: Request, error: Any) -> Response:
        found = ApiError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
        return JSONResponse(found.body, error.status_code, headers=error.headers)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """It takes requests now; a policy that was refused while an older one serves is told, but no reason not to."""
        problem = "shutting down" if front.draining else await engine.problem()
        if problem is None:
            try:
                await asyncio.to_thread(policies.current)
            except Exception:  # told in the log; its text may name paths
                problem = "no policy"
        state = {"status": "ready" if problem is None else "not ready", "problem": problem}
        stale = "the newest policy was refused, an older one serves" if policies.problem else None
        return JSONResponse({**state, "policy_problem": stale}, 200 if problem is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served."""
        await front.identify(request.headers.get("authorization"))
        return {"object": "list", "data": [_model(engine.model)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        await front.identify(request.headers.get("authorization"))
        if name != engine.model:
            raise ApiError(404, "there is no such model here", code="model_not_found")
        return _model(engine.model)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _respond(front, request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _respond(front, request, chat=False)

    if playground is not None:
        add_playground(app, front, playground, _respond)
    return app


async def _respond(front: RequestHandler, request: Request, *, chat: bool, bare: bool = False) -> Response:
    call = await front.identify(request.headers.get("authorization"))
    call.bare = bare
    try:
        try:
            body = await front.in_time(call, _body(request, front.limits.body_bytes))
            asked = read_request(body, chat=chat)
        except Exception as error:
            shown = as_api_error(error)
            await front.refuse(call, shown)
            raise shown from error
        pieces = front.answer(call, asked)
        async with _while_connected(request) as connected:
            if asked.stream:
                first = await connected(anext(pieces))
            else:
                answers = await connected(_collect(pieces, len(asked.prompts) * asked.n))
    except ApiError as error:
        error.headers["x-request-id"] = call.id
        raise
    fingerprint = f"fp_{call.set_digest[:16] or 'base'}"
    shape = ResponseFormat(
        chat, ("chatcmpl-" if chat else "cmpl-") + call.id.removeprefix("req-"), front.engine.model, call.created,
        fingerprint, asked.settings["logprobs"] is not None,
    )  # fmt: skip
    headers = {"x-request-id": call.id}
    if asked.stream:
        return _EventStream(pieces, _events(shape, call, asked, first, pieces), headers)
    return JSONResponse(shape.body(answers, call.usage), headers=headers)


async def _body(request: Request, most: int) -> bytes:
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    except ClientDisconnect:
        raise ApiError(499, "the client has gone", code="client_gone") from None
    return bytes(found)


@asynccontextmanager
async def _while_connected(request: Request) -> AsyncIterator[Any]:
    """Give a function that awaits something, and cancels it when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def connected(what: Any) -> Any:
        work = asyncio.ensure_future(what)
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(499, "the client has gone")
            return await work
        finally:
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    watch = asyncio.ensure_future(gone())
    try:
        yield connected
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def _collect(pieces: Pieces, places: int) -> list[Answer]:
    answers = [Answer(n) for n in range(places)]
    async with aclosing(pieces):
        async for number, piece in pieces:
            answer = answers[number]
            answer.text += piece.text
            answer.logprobs += piece.logprobs
            answer.finish_reason = piece.finish_reason
    return answers


async def _events(
    shape: ResponseFormat, call: Call, asked: ParsedRequest, first: tuple[int, TextChunk], rest: Pieces
) -> AsyncGenerator[str, None]:
    written = [0] * (len(asked.prompts) * asked.n)
    if shape.chat:
        for number in range(len(written)):
            yield _event(shape.role(number))

    def told(number: int, piece: TextChunk) -> str:
        before = written[number]
        written[number] += len(piece.text)
        return _event(shape.event(number, piece.text, piece.logprobs, piece.finish_reason, before))

    yield told(*first)
    try:
        async for number, piece in rest:
            yield told(number, piece)
    except ApiError as error:  # the status is out already
        yield _event(error.body)
        return
    if asked.include_usage:
        yield _event(shape.usage_event(call.usage))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """A stream of events that ends its generation also when it never gets to begin."""

    def __init__(self, pieces: Pieces, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store", **headers})
        self._pieces, self._events = pieces, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._pieces.aclose()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "unlearn-peft"}
