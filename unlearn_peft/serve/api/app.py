"""The HTTP side: OpenAI's routes, health, metrics. Bodies come in, JSON or a stream of events goes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from ...errors import PolicyError
from ..audit import AuditLog
from ..engine.base import TextChunk
from ..handler import RequestHandler
from ..limits import LOOPBACK, Limits
from ..request import ApiError, Call, ParsedRequest, as_api_error
from .access import AccessLog, identify, while_connected
from .connection import free_answers
from .document import add_document
from .playground import Playground, add_playground
from .requests import read_request
from .responses import Answer, ResponseFormat

Chunks = AsyncGenerator[tuple[int, TextChunk], None]  # each with the number of its answer


def create_app(
    handler: RequestHandler, playground: Playground | None = None, access: AuditLog | None = None, *,
    metrics: bool = True,
) -> FastAPI:  # fmt: skip
    """Return the server as an ASGI app; without a `playground` there is no page. `access` gets a line a response.

    Without `metrics` there is no /metrics.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await handler.close()
        if access is not None:
            access.close()

    app = FastAPI(
        title="unlearn-peft", lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,  # a redirected POST would go where the Host header says, key and all
    )  # fmt: skip
    app.state.handler, app.state.free_answers = handler, free_answers()
    if handler.open_tenant is not None:  # without keys, a web page could get in by DNS rebinding
        hosts = [f"[{name}]" if ":" in name else name for name in LOOPBACK]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

    if access is not None:
        app.add_middleware(AccessLog, log=access)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Any) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def wrong_route(_: Request, error: Any) -> Response:
        status = error.status_code
        body = ApiError(status, str(error.detail), code="not_found" if status == 404 else None).body
        return JSONResponse(body, status, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(as_api_error(error).body, 500)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Every request would be refused."}})
    async def readyz() -> JSONResponse:
        """Whether it accepts requests; it does so under an older policy, too, while the newest is refused."""
        problem = await _problem(handler)
        state = {"status": "ready" if problem is None else "not ready", "problem": problem}
        stale = "the newest policy was refused, an older one serves" if handler.policies.problem else None
        return JSONResponse({**state, "policy_problem": stale}, 200 if problem is None else 503)

    if metrics:

        @app.get("/metrics", response_class=PlainTextResponse)
        def metrics_text() -> Response:  # in a thread of its own: where tenants are many, it takes seconds
            return Response(handler.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        await identify(handler, request)
        return {"object": "list", "data": [_model(handler.engine.model)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        await identify(handler, request)
        if name != handler.engine.model:
            raise ApiError(404, "there is no such model here", code="model_not_found")
        return _model(name)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _respond(handler, request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _respond(handler, request, chat=False)

    add_document(app)
    if playground is not None:
        add_playground(app, handler, playground, _respond)
    return app


async def _problem(handler: RequestHandler) -> str | None:
    """Return why every request would be refused now, in words for anybody, or None."""
    if handler.draining:
        return "the server is shutting down"
    problem = await handler.engine.problem()
    if problem is None:
        try:
            await asyncio.to_thread(handler.policies.current)
        except PolicyError as error:  # its text may name paths
            problem = error.public
    if problem is None and handler.audit is not None and handler.audit.required:
        problem = await asyncio.to_thread(handler.audit.problem)
    return problem


async def _respond(handler: RequestHandler, request: Request, *, chat: bool, base_only: bool = False) -> Response:
    if handler.open_tenant is not None:
        _refuse_other_pages(request)
    call = await identify(handler, request, "playground" if base_only else None)
    call.base_only = base_only
    if handler.tracing is not None:
        handler.tracing.start(call, request.headers, handler.engine.model, chat=chat)
    try:
        try:
            handler.enter(call)
            body = await handler.in_time(call, _read_body(request, handler.limits))
            reading = handler.in_turn(call, partial(read_request, body, chat=chat))
            parsed = await while_connected(request, reading)
            del body
        except Exception as error:
            refusal = as_api_error(error)
            await handler.refuse(call, refusal)
            raise refusal from error
        chunks = handler.answer(call, parsed)
        if parsed.stream:
            first = await while_connected(request, anext(chunks))
        else:
            answers = await while_connected(request, _collect(chunks))
    except BaseException as error:
        handler.leave(call)
        if isinstance(error, ApiError):
            error.headers["x-request-id"] = call.id
        raise
    fingerprint = f"fp_{call.set_digest[:16] or 'base'}"
    response = ResponseFormat(
        chat, ("chatcmpl-" if chat else "cmpl-") + call.id.removeprefix("req-"), handler.engine.model, call.created,
        fingerprint, parsed.settings["logprobs"] is not None, parsed.called,
    )  # fmt: skip
    headers = {"x-request-id": call.id}
    if parsed.stream:
        return _EventStream(chunks, _events(response, call, parsed, first, chunks), headers)
    text = await asyncio.to_thread(response.text, answers, call.usage)
    return Response(text, headers=headers, media_type="application/json")


def _refuse_other_pages(request: Request) -> None:
    """Without keys, refuse what pages of other servers send: a browser asks nobody before a simple POST.

    Raises:
        ApiError: the request's `Origin` is another than this server.
    """
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin not in (None, f"http://{host}", f"https://{host}"):
        message = "a web page of another server sent this, and this one has no keys: expected its own page, or no page"
        raise ApiError(403, message, code="cross_origin")


async def _read_body(request: Request, limits: Limits) -> bytes:
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > limits.body_bytes:
                raise ApiError(413, f"the body is larger than {limits.body_bytes} bytes", code="body_too_large")

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except ClientDisconnect:
        raise ApiError(499, "the client has gone", code="client_gone") from None
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s: {len(body)} bytes of it did"
        raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from None
    return bytes(body)


async def _collect(chunks: Chunks) -> list[Answer]:
    answers = dict[int, Answer]()
    async with aclosing(chunks):
        async for number, chunk in chunks:
            answer = answers.setdefault(number, Answer(number))
            answer.text += chunk.text
            answer.logprobs += chunk.logprobs
            answer.finish_reason = chunk.finish_reason
    return [answers[number] for number in sorted(answers)]


async def _events(
    response: ResponseFormat, call: Call, parsed: ParsedRequest, first: tuple[int, TextChunk], rest: Chunks
) -> AsyncGenerator[str, None]:
    lengths = [0] * (len(parsed.prompts) * parsed.n)  # of the answers so far, in characters
    whole = [Answer(number) for number in range(len(lengths))]  # where they call tools: what is not sent yet
    if response.chat:
        for number in range(len(lengths)):
            yield _event(response.role(number))

    def chunk_event(number: int, chunk: TextChunk) -> str:
        text, logprobs = chunk.text, chunk.logprobs
        if response.called is not None:
            answer = whole[number]
            answer.text += text
            answer.logprobs += logprobs
            if chunk.finish_reason is None:
                return ""
            text, logprobs = answer.text, tuple(answer.logprobs)
        offset = lengths[number]
        lengths[number] += len(text)
        return _event(response.event(number, text, logprobs, chunk.finish_reason, offset))

    yield chunk_event(*first)
    try:
        async for number, chunk in rest:
            yield chunk_event(number, chunk)
            await asyncio.sleep(0)  # or a client that has gone is not noticed while there is more to send
    except ApiError as error:  # the status is sent already
        yield _event(error.body)
        return
    if parsed.include_usage:
        yield _event(response.usage_event(call.usage))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """A stream of events that ends its generation even if it is never started."""

    def __init__(self, chunks: Chunks, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store", **headers})
        self._chunks, self._events = chunks, events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._chunks.aclose()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "unlearn-peft"}
