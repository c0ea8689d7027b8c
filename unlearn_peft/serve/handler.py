"""From a tenant's request to chunks of its answers: who asks, what must be forgotten, is there room, what is recorded.

It fails closed: no token is generated before everything that the tenant's policy names (and what the request adds) is
loaded, checked against the policy, and written to the audit log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable
from contextlib import ExitStack, aclosing
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeVar

from ..errors import OutputError, PolicyError
from .audit import AuditLog, describe
from .engine.base import AdapterLease, Engine, EngineStats, Generation, GenerationError, TextChunk, Unavailable
from .limits import Limits
from .metrics import Metrics
from .policy.policy import PolicySource
from .request import ApiError, Call, ParsedRequest, as_api_error

logger = logging.getLogger(__name__)
T = TypeVar("T")
_AHEAD = 2  # requests beyond a full batch that have their adapters already, so that a free place is taken at once
_Chunks = asyncio.Queue[tuple[int, TextChunk | Exception]]  # each with the number of its answer


@dataclass(eq=False)
class RequestHandler:
    """Everything between HTTP and the engine."""

    engine: Engine
    policies: PolicySource
    _: KW_ONLY
    limits: Limits = Limits()
    audit: AuditLog | None = None  # where each request is recorded; None: nowhere
    open_tenant: str | None = None  # the tenant of all requests, without any key; None: keys are required

    def __post_init__(self) -> None:
        self.metrics = Metrics(self._stats)
        self.draining = False
        self.shows_base = False  # set by the playground alone, if it was started so
        # of requests with a lease: those that wait have none, so that memory is for those that run
        self._slots = asyncio.Semaphore(self.limits.batch + _AHEAD)
        self._cleanups = set[asyncio.Future[None]]()
        self._active = Counter[str]()  # answers running and waiting, by tenant
        self._mean_seconds = 1.0  # moving average of a request's duration

    @property
    def active(self) -> int:
        """Answers that run or wait."""
        return self._active.total()

    async def identify(self, authorization: str | None) -> Call:
        """Find out whose request this is, under the current policy.

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
            message = "this API key is not known" if key else "an API key is needed: Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise self._refused(ApiError(401, message, code="invalid_api_key", headers=headers))
        return Call(tenant, policy)

    async def answer(self, call: Call, request: ParsedRequest) -> AsyncGenerator[tuple[int, TextChunk], None]:
        """Generate all answers of a request; yields chunks, each with the number of its answer.

        Closing it early cancels what still runs.

        Raises:
            ApiError: whatever refused the request or ended it.
        """
        count, tasks = len(request.prompts) * request.n, list[asyncio.Task[None]]()
        taken, recorded, client_gone = ExitStack(), False, False  # what is taken is given back, the last first
        try:
            self._check_limits(call, request, count)
            self._active[call.tenant] += count
            taken.callback(self._count_out, call, count)
            generations = await self._encode(call, request)
            await self.in_time(call, self._slots.acquire())
            taken.callback(self._slots.release)
            lease = await self._hold(call, request)
            taken.callback(lease.release)
            await self._record("admitted", call, **({"asked": request.prompts} if self._records_text else {}))
            chunks = _Chunks()
            tasks = [asyncio.create_task(self._generate(n, g, lease, chunks)) for n, g in enumerate(generations)]
            running, texts = count, [""] * count
            while running:
                number, chunk = await self.in_time(call, chunks.get())
                if isinstance(chunk, Exception):
                    raise chunk
                if call.completion_tokens == 0:
                    self.metrics.first.observe(time.monotonic() - call.began)
                call.completion_tokens += chunk.tokens
                running -= chunk.finish_reason is not None
                if self._records_text:
                    texts[number] += chunk.text
                if not running:
                    await self._finish(call, 200, answers=texts)
                    recorded = True
                yield number, chunk
        except (asyncio.CancelledError, GeneratorExit):
            client_gone = not recorded
            raise
        except Exception as error:
            refusal = self._refused(as_api_error(error))
            await self._finish(call, refusal.status, refusal.code)
            raise refusal from error
        finally:
            # in its own task, since a client that goes away cancels each wait in here again
            cleanup = asyncio.ensure_future(self._clean_up(call, tasks, taken, client_gone))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)
            await asyncio.shield(cleanup)

    async def in_time(self, call: Call, awaitable: Awaitable[T]) -> T:
        """Await something for as long as the request may still take.

        Raises:
            asyncio.TimeoutError: if it takes longer.
        """
        remaining = call.began + self.limits.seconds - time.monotonic()
        return await asyncio.wait_for(awaitable, max(remaining, 0))

    async def refuse(self, call: Call, error: ApiError) -> None:
        """Record a request that was refused before `answer`."""
        await self._finish(call, self._refused(error).status, error.code)

    async def close(self) -> None:
        """Stop the engine and close the audit log."""
        await self.engine.close()
        if self.audit is not None:
            self.audit.close()

    def _check_limits(self, call: Call, request: ParsedRequest, count: int) -> None:
        limits = self.limits
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining", headers={"Retry-After": "5"})
        if request.model != self.engine.model:
            message = f"there is no model '{request.model[:100]}' here: expected '{self.engine.model}'"
            raise ApiError(404, message, code="model_not_found", param="model")
        if count > limits.answers:
            message = f"{count} answers in one request: at most {limits.answers}"
            raise ApiError(400, message, code="too_many_answers", param="n")
        room = limits.batch + limits.queue
        share = room if limits.per_tenant is None else limits.per_tenant
        if self.active + count > room or self._active[call.tenant] + count > share:
            wait = math.ceil(self._mean_seconds * max(1.0, self.active / limits.batch))
            message = "the queue is full" if self.active + count > room else "too many requests of yours are under way"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(min(max(wait, 1), 60))})

    async def _encode(self, call: Call, request: ParsedRequest) -> list[Generation]:
        limits, generations = self.limits, []
        for prompt in request.prompts:
            ids = await self.in_time(call, self.engine.encode(prompt, request.variables))
            call.prompt_tokens += len(ids)
            room = self.engine.context - len(ids)
            max_tokens = request.max_tokens or min(limits.max_tokens, room)
            if len(ids) > limits.prompt_tokens or room < 1:
                limit = min(limits.prompt_tokens, self.engine.context - 1)
                message = f"the prompt has {len(ids)} tokens: at most {limit}"
                raise ApiError(400, message, code="context_length_exceeded")
            if max_tokens > limits.max_tokens or max_tokens > room:
                message = f"max_tokens is {max_tokens}: at most {min(limits.max_tokens, room)} for this prompt"
                raise ApiError(400, message, code="context_length_exceeded", param="max_tokens")
            settings = dict(request.settings)
            if not isinstance(prompt, str) and prompt and not isinstance(prompt[0], int):
                settings["stop"] += self.engine.chat_ends
            for n in range(request.n):
                if settings["seed"] is not None:  # n different answers, the same ones each time
                    settings["seed"] = (request.settings["seed"] + n) % 2**63
                generations.append(Generation(ids, max_tokens, **settings))
        return generations

    async def _hold(self, call: Call, request: ParsedRequest) -> AdapterLease:
        for name in request.forget:
            if name not in call.policy.adapters:
                raise ApiError(400, f"there is no adapter '{name[:100]}'", code="unknown_adapter", param="forget")
        if call.base_only and (request.forget or not self.shows_base):
            raise ApiError(403, "this server does not show the base alone", code="base_not_shown")
        forget = {} if call.base_only else call.policy.forget_of(call.tenant, request.forget)
        trust = call.policy.trust_of(call.tenant)
        lease = await self.in_time(call, self.engine.hold(forget, call.policy, trust))
        unsigned = trust is not None and any(adapter.signed_by not in trust.signers for adapter in lease.applied)
        if unsigned or {adapter.name: adapter.strength for adapter in lease.applied} != forget:
            lease.release()
            raise Unavailable("the engine has other adapters than the policy requires", ", ".join(forget))
        call.applied, call.set_digest = describe(lease.applied), lease.digest
        return lease

    async def _generate(self, number: int, generation: Generation, lease: AdapterLease, chunks: _Chunks) -> None:
        try:
            async with aclosing(self.engine.stream(generation, lease)) as stream:
                async for chunk in stream:
                    chunks.put_nowait((number, chunk))
                    if chunk.finish_reason is not None:
                        return
            raise GenerationError("the engine's answer broke off")
        except Exception as error:
            chunks.put_nowait((number, error))

    def _count_out(self, call: Call, count: int) -> None:
        self._active[call.tenant] -= count
        self._mean_seconds += (time.monotonic() - call.began - self._mean_seconds) / 16

    async def _clean_up(self, call: Call, tasks: list[asyncio.Task[None]], taken: ExitStack, client_gone: bool) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        taken.close()
        self.metrics.active.set(self.active)
        if client_gone:
            await self._finish(call, 499, "client_gone")

    def _stats(self) -> EngineStats:
        stats = self.engine.stats()
        return stats if stats.running is None else replace(stats, waiting=max(self.active - stats.running, 0))

    @property
    def _records_text(self) -> bool:
        return self.audit is not None and self.audit.prompts

    async def _finish(self, call: Call, status: int, code: str | None = None, answers: list[str] | None = None) -> None:
        """Record and count a request's end. If that cannot be written, only an answer that is not whole yet fails."""
        try:
            await self._record(
                "finished", call, status=status, code=code, prompt_tokens=call.prompt_tokens,
                completion_tokens=call.completion_tokens,
                **({"answers": answers} if self._records_text and answers else {}),
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
            "adapters": call.applied, **({"playground_base": True} if call.base_only else {}), **fields,
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
