"""From a tenant's request to pieces of its answers: who asks, what must be forgotten, is there room, what is recorded.

It fails closed: no token is generated before all that the tenant's policy names (and what the request adds) is held,
checked against the policy, and written to the audit log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import OutputError, PolicyError
from .audit import AuditLog, describe
from .engine.base import (
    AdapterLease,
    Busy,
    Engine,
    EngineStats,
    Generation,
    GenerationError,
    PromptError,
    TextChunk,
    Unavailable,
)
from .limits import Limits
from .metrics import Metrics
from .policy.policy import PolicySource
from .request import ApiError, Call, ParsedRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")
_AHEAD = 2  # requests beyond a full batch that hold their sets already, so that a place is taken at the next step


class RequestHandler:
    """Everything between HTTP and the engine.

    Args:
        engine: what generates.
        policies: who must have what forgotten.
        limits: what is taken on.
        audit: where each request is recorded; None: nowhere.
        open_tenant: whom requests belong to, without any key; None: keys are needed.
    """

    def __init__(
        self,
        engine: Engine,
        policies: PolicySource,
        *,
        limits: Limits | None = None,
        audit: AuditLog | None = None,
        open_tenant: str | None = None,
    ) -> None:
        self.engine, self.policies, self.limits = engine, policies, limits or Limits()
        self.audit, self.open_tenant = audit, open_tenant
        self.metrics = Metrics(self._stats)
        self.draining = False
        # of requests that hold their sets; those that wait hold nothing, so that memory is for those that run
        self._slots = asyncio.Semaphore(self.limits.batch + _AHEAD)
        self._leaving = set[asyncio.Future[None]]()
        self.shows_base = False  # set by the playground alone, if it was started so
        self._active = Counter[str]()  # answers running and waiting, by tenant
        self._mean_seconds = 1.0  # of a request, the latest ones counting most

    @property
    def active(self) -> int:
        """Answers that run or wait."""
        return self._active.total()

    async def identify(self, authorization: str | None) -> Call:
        """Find out whose request this is, under the policy of this moment.

        Raises:
            ApiError: 401 without a known key, 503 if there is no policy.
        """
        try:
            policy = await asyncio.to_thread(self.policies.current)
        except PolicyError as error:
            logger.error("no policy, all requests are refused: %s", error)
            raise self._refused(ApiError(503, "there is no policy to serve under", code="policy_unavailable")) from None
        self.metrics.policy_problem.set(self.policies.problem is not None)
        if self.open_tenant is not None:
            return Call(self.open_tenant, policy)
        scheme, _, key = (authorization or "").partition(" ")
        tenant = policy.tenant_of(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        if tenant is None:
            told = "this API key is not known" if key else "an API key is needed: Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise self._refused(ApiError(401, told, code="invalid_api_key", headers=headers))
        return Call(tenant, policy)

    async def answer(self, call: Call, asked: ParsedRequest) -> AsyncGenerator[tuple[int, TextChunk], None]:
        """Generate all answers of a request; yields pieces, each with the number of its answer.

        Closing it early cancels what still runs.

        Raises:
            ApiError: for whatever refused the request or ended it.
        """
        places, tasks = len(asked.prompts) * asked.n, list[asyncio.Task[None]]()
        holding: AdapterLease | None = None
        admitted = slot = told = gone = False
        try:
            self._check(call, asked, places)
            self._active[call.tenant] += places
            admitted = True
            requests = await self._generations(call, asked)
            slot = await self.in_time(call, self._slots.acquire())
            holding = await self._hold(call, asked)
            await self._record("admitted", call, **({"asked": asked.prompts} if self._prompts else {}))
            pieces = asyncio.Queue[tuple[int, TextChunk | Exception]]()
            tasks = [
                asyncio.create_task(self._generate(n, request, holding, pieces)) for n, request in enumerate(requests)
            ]
            running, texts = places, [""] * places
            while running:
                number, piece = await self.in_time(call, pieces.get())
                if isinstance(piece, Exception):
                    raise piece
                if call.completion_tokens == 0:
                    self.metrics.first.observe(time.monotonic() - call.began)
                call.completion_tokens += piece.tokens
                running -= piece.finish_reason is not None
                if self._prompts:
                    texts[number] += piece.text
                if not running:
                    await self._finish(call, 200, answers=texts)
                    told = True
                yield number, piece
        except (asyncio.CancelledError, GeneratorExit):
            gone = not told
            raise
        except Exception as error:
            shown = self._refused(as_api_error(error))
            await self._finish(call, shown.status, shown.code)
            raise shown from error
        finally:
            # in a task of its own, since a client that goes away cancels each wait in here again
            places = places if admitted else 0
            leaving = asyncio.ensure_future(self._leave(call, tasks, holding, places, slot=slot, gone=gone))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)

    async def in_time(self, call: Call, what: Awaitable[T]) -> T:
        """Await something for as long as the request has left.

        Raises:
            asyncio.TimeoutError: if it takes longer.
        """
        left = call.began + self.limits.seconds - time.monotonic()
        return await asyncio.wait_for(what, max(left, 0))

    async def refuse(self, call: Call, error: ApiError) -> None:
        """Record a request that was refused before `answer`."""
        await self._finish(call, self._refused(error).status, error.code)

    async def close(self) -> None:
        """Stop the engine and close the audit log."""
        await self.engine.close()
        if self.audit is not None:
            self.audit.close()

    async def _leave(
        self,
        call: Call,
        tasks: list[asyncio.Task[None]],
        holding: AdapterLease | None,
        places: int,
        *,
        slot: bool,
        gone: bool,
    ) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if holding is not None:
            holding.release()
        if slot:
            self._slots.release()
        if places:
            self._active[call.tenant] -= places
            self._mean_seconds += (time.monotonic() - call.began - self._mean_seconds) / 16
        self.metrics.active.set(self.active)
        if gone:
            await self._finish(call, 499, "client_gone")

    def _stats(self) -> EngineStats:
        stats = self.engine.stats()
        return stats if stats.running is None else replace(stats, waiting=max(self.active - stats.running, 0))

    def _check(self, call: Call, asked: ParsedRequest, places: int) -> None:
        limits = self.limits
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "5"})
        if asked.model != self.engine.model:
            told = f"there is no model '{asked.model[:100]}' here: expected '{self.engine.model}'"
            raise ApiError(404, told, code="model_not_found", param="model")
        if places > limits.answers:
            told = f"{places} answers in one request: at most {limits.answers}"
            raise ApiError(400, told, code="too_many_answers", param="n")
        room = limits.batch + limits.queue
        share = room if limits.per_tenant is None else limits.per_tenant
        if self.active + places > room or self._active[call.tenant] + places > share:
            wait = math.ceil(self._mean_seconds * max(1.0, self.active / limits.batch))
            told = "the queue is full" if self.active + places > room else "too many requests of yours are under way"
            raise ApiError(429, told, code="queue_full", headers={"Retry-After": str(min(max(wait, 1), 60))})

    async def _generations(self, call: Call, asked: ParsedRequest) -> list[Generation]:
        limits, found = self.limits, []
        for prompt in asked.prompts:
            ids = await self.in_time(call, self.engine.encode(prompt))
            call.prompt_tokens += len(ids)
            room = self.engine.context - len(ids)
            longest = asked.max_tokens or min(limits.max_tokens, room)
            if len(ids) > limits.prompt_tokens or room < 1:
                most = min(limits.prompt_tokens, self.engine.context - 1)
                told = f"the prompt has {len(ids)} tokens: at most {most}"
                raise ApiError(400, told, code="context_length_exceeded")
            if longest > limits.max_tokens or longest > room:
                told = f"max_tokens is {longest}: at most {min(limits.max_tokens, room)} for this prompt"
                raise ApiError(400, told, code="context_length_exceeded", param="max_tokens")
            settings = dict(asked.settings)
            for n in range(asked.n):
                if settings["seed"] is not None:  # n different answers, the same ones each time
                    settings["seed"] = (asked.settings["seed"] + n) % 2**63
                found.append(Generation(ids, longest, request_id=call.id, **settings))
        return found

    async def _hold(self, call: Call, asked: ParsedRequest) -> AdapterLease:
        for name in asked.forget:
            if name not in call.policy.adapters:
                raise ApiError(400, f"there is no adapter '{name[:100]}'", code="unknown_adapter", param="forget")
        if call.bare and (asked.forget or not self.shows_base):
            raise ApiError(403, "the base alone is not shown so", code="base_not_shown")
        forget = {} if call.bare else call.policy.forget_of(call.tenant, asked.forget)
        trust = call.policy.trust_of(call.tenant)
        holding = await self.in_time(call, self.engine.hold(forget, call.policy, trust))
        unsigned = trust is not None and any(one.signed_by not in trust.signers for one in holding.applied)
        if unsigned or {one.name: one.strength for one in holding.applied} != forget:
            holding.release()
            raise Unavailable("the engine holds another set than the one asked for", ", ".join(forget))
        call.applied, call.set_digest = describe(holding.applied), holding.digest
        return holding

    async def _generate(
        self,
        number: int,
        request: Generation,
        holding: AdapterLease,
        pieces: asyncio.Queue[tuple[int, TextChunk | Exception]],
    ) -> None:
        try:
            async with aclosing(self.engine.stream(request, holding)) as stream:
                async for piece in stream:
                    pieces.put_nowait((number, piece))
                    if piece.finish_reason is not None:
                        return
            raise GenerationError("the engine's answer broke off")
        except Exception as error:
            pieces.put_nowait((number, error))

    @property
    def _prompts(self) -> bool:
        return self.audit is not None and self.audit.prompts

    async def _finish(self, call: Call, status: int, code: str | None = None, answers: list[str] | None = None) -> None:
        """Record and count a request's end. A line that cannot be written matters only before the answer is whole."""
        try:
            await self._record(
                "finished", call, status=status, code=code, prompt_tokens=call.prompt_tokens,
                completion_tokens=call.completion_tokens, **({"answers": answers} if self._prompts and answers else {}),
            )  # fmt: skip
        except OutputError:
            if status == 200:
                raise
        self.metrics.requests.labels(call.tenant, str(status)).inc()
        self.metrics.seconds.observe(time.monotonic() - call.began)
        for kind, count in (("prompt", call.prompt_tokens), ("completion", call.completion_tokens)):
            self.metrics.tokens.labels(call.tenant, kind).inc(count)

    async def _record(self, event: str, call: Call, **fields: Any) -> None:
        if self.audit is None:
            return
        line = {
            "id": call.id, "tenant": call.tenant, "policy": call.policy.version, "set": call.set_digest,
            "adapters": call.applied, **({"playground_base": True} if call.bare else {}), **fields,
        }  # fmt: skip
        try:
            if self.audit.fsync:
                await asyncio.to_thread(self.audit.write, event, **line)
            else:
                self.audit.write(event, **line)
        except OutputError as error:
            logger.error("%s", error)
            if self.audit.required:
                raise

    def _refused(self, error: ApiError) -> ApiError:
        self.metrics.refusals.labels(error.code or "none").inc()
        return error


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error. What it says of paths and digests goes to the log alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, asyncio.TimeoutError):
        return ApiError(504, "the request took too long", code="timeout")
    if isinstance(error, GenerationError):
        logger.error("an answer could not be finished: %s", error)
        return ApiError(500, str(error), code="generation_failed")
    if isinstance(error, Unavailable):
        logger.error("refused, adapter '%s': %s", error.adapter, error)
        told = f"the adapter '{error.adapter}'" if error.adapter else "something that must be forgotten"
        return ApiError(
            503, f"{told} cannot be applied now, so this request is refused", code="adapter_unavailable",
            adapter=error.adapter,
        )  # fmt: skip
    if isinstance(error, PolicyError):
        logger.error("refused: %s", error)
        return ApiError(503, "the policy cannot be applied now, so this request is refused", code="policy_unavailable")
    if isinstance(error, OutputError):
        return ApiError(503, "the audit log cannot be written, so this request is refused", code="audit_unavailable")
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "an unexpected error; see the server's log", code="internal_error")
