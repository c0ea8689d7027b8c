"""From a tenant's request to chunks of its answers: who asks, what must be forgotten, is there room, what is recorded.

It fails closed: no token is generated before everything that the tenant's policy names (and what the request adds) is
loaded, checked against the policy, and written to the audit log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import TypeVar

from ..errors import PolicyError
from .admission import Places, answer_tokens, check_size, is_chat
from .audit import AuditLog, describe
from .canary import Canary
from .engine.base import AdapterLease, Engine, EngineStats, Generation, GenerationError, TextChunk, Unavailable
from .fair_queue import FairQueue, in_thread
from .key_log import KeyLog
from .limits import Limits
from .metrics import Metrics
from .policy.policy import Key, Policy, PolicySource
from .quotas import Quotas
from .recorder import Recorder
from .request import ApiError, Call, ParsedRequest, as_api_error
from .tracing import Tracing

logger = logging.getLogger(__name__)
T = TypeVar("T")
_AHEAD = 2  # answers beyond a full batch that have their adapters already, so that a free place is taken at once
_READING = 4  # bodies and prompts that are read at once, each of another tenant
# Reading holds Python's lock, which each step of the model needs, and the pass over a prompt is a step that all wait
# for. After either, its tenant waits for a multiple of the time that it took, if others are there: it has a fifth
_WAIT = 4.0
_REQUEST_SECONDS = 0.001  # that a request takes on the event loop, beside reading
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
    tracing: Tracing | None = None  # where each request's span is written; None: nowhere

    def __post_init__(self) -> None:
        self.metrics = Metrics(self._stats)
        self._recorder = Recorder(self.audit, self.metrics, self.tracing)
        self.draining = False
        self.shows_base = False  # set by the playground alone, if it was started so
        self.metrics.active.set_function(lambda: self.active)
        self._places = Places(self.limits, only_tenant=self.open_tenant is not None)
        self._reading = FairQueue(_READING, per_tenant=1, present=self._places.present)
        # of requests with a lease: those that wait have none, so that memory is for those that run. Tenants that have
        # some leave the last to those that have none, so that another's answer waits for a place in the batch alone
        self._leases = FairQueue(self.limits.batch + 2 * _AHEAD, spare=_AHEAD, present=self._places.present)
        # nor do they take all of the batch, however long their answers: a further tenant starts at once
        spare = 0 if self.open_tenant is not None or self.limits.batch == 1 else 1 + _AHEAD
        rows, room = self.limits.batch + _AHEAD, self.engine.kv_tokens
        self._rows = FairQueue(rows, spare=spare, room=room, share=self._row_share)
        self._canary = Canary(self.engine, self._rows, self._recorder.write, self.metrics, self.limits.seconds)
        self._quotas = Quotas(self.limits.quotas)
        self._keys = KeyLog(self.policies)
        self._cleanups = set[asyncio.Future[None]]()

    @property
    def active(self) -> int:
        """Answers that run or wait."""
        return self._places.active

    async def identify(self, authorization: str | None, client: str | None = None, scope: str | None = None) -> Call:
        """Find out whose request this is, under the current policy; its key must allow `scope`, see `KeyEntry`.

        Raises:
            ApiError: 401 without a known key that is not over, 403 without the scope, 503 if there is no policy.
        """
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        try:
            policy, found = await asyncio.to_thread(self._look_up, key)
        except PolicyError as error:
            logger.error("no policy, all requests are refused: %s", error)
            refusal = ApiError(503, "there is no policy to serve under", code="policy_unavailable")
            raise self._recorder.refused(refusal) from None
        self.metrics.policy_problem.set(self.policies.problem is not None)
        if self.open_tenant is not None:
            return Call(self.open_tenant, policy, client=client)
        try:
            found = self._keys.check(found, client, given=bool(key))
        except ApiError as error:
            raise self._recorder.refused(error) from None
        call = Call(found.tenant, policy, found, client)
        call.require(*([scope] if scope else []))
        return call

    def enter(self, call: Call) -> None:
        """Count a request as under way while its body is still to be read; `answer` and `leave` end that.

        Raises:
            ApiError: 429 if there is no room or a quota is used up, 503 while shutting down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        self._places.claim(call, 1)
        self._quotas.admit(call)

    def leave(self, call: Call) -> None:
        """Count a request as under way no longer. A second call does nothing."""
        self._places.leave(call)

    async def answer(self, call: Call, request: ParsedRequest) -> AsyncGenerator[tuple[int, TextChunk], None]:
        """Generate all answers of a request; yields chunks, each with the number of its answer.

        Closing it early cancels what still runs. Where chunks are fetched slowly, they are kept: nobody else waits.

        Raises:
            ApiError: whatever refused the request or ended it.
        """
        producer: asyncio.Task[None] | None = None
        recorded, client_gone = False, False
        try:
            count = self._check_limits(call, request)
            generations, chunks = await self._encode(call, request), _Chunks()
            producer = asyncio.create_task(self._produce(call, request, generations, chunks))
            running, texts = count, [""] * count
            while running:
                number, chunk = await chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                if call.first is None:
                    call.first = time.monotonic()
                    self.metrics.first.observe(call.first - call.began)
                call.completion_tokens += chunk.tokens
                running -= chunk.finish_reason is not None
                if self._recorder.keeps_text:
                    texts[number] += chunk.text
                if not running:
                    await self._recorder.finish(call, 200, answers=texts)
                    recorded = True
                yield number, chunk
        except (asyncio.CancelledError, GeneratorExit):
            client_gone = not recorded
            raise
        except Exception as error:
            refusal = self._recorder.refused(as_api_error(error))
            await self._recorder.finish(call, refusal.status, refusal.code)
            raise refusal from error
        finally:
            # in its own task, since a client that goes away cancels each wait in here again
            cleanup = asyncio.ensure_future(self._clean_up(call, producer, client_gone))
            self._cleanups.add(cleanup)
            cleanup.add_done_callback(self._cleanups.discard)
            await asyncio.shield(cleanup)

    async def in_turn(self, call: Call, work: Callable[[], T], more: Sequence[float] = ()) -> T:
        """Do something that takes a processor's time, in a thread, when it is its tenant's turn, and as `in_time`.

        Its place is free when it has ended, which may be long after its client has gone. It takes `more` seconds, too.
        """
        await self.in_time(call, self._reading.acquire(call.tenant))
        task = in_thread(self._reading, call.tenant, work, lambda took: _WAIT * (took + sum(more) + _REQUEST_SECONDS))
        return await self.in_time(call, asyncio.shield(task))

    async def in_time(self, call: Call, awaitable: Awaitable[T]) -> T:
        """Await something for as long as the request may still take.

        Raises:
            asyncio.TimeoutError: if it takes longer.
        """
        remaining = call.began + self.limits.seconds - time.monotonic()
        return await asyncio.wait_for(awaitable, max(remaining, 0))

    async def refuse(self, call: Call, error: ApiError) -> None:
        """Record a request that was refused before `answer`."""
        self.leave(call)
        await self._recorder.finish(call, self._recorder.refused(error).status, error.code)

    async def close(self) -> None:
        """Stop the engine and close the audit log."""
        await self.engine.close()
        await self._keys.close()
        if self.audit is not None:
            self.audit.close()

    def _look_up(self, key: str) -> tuple[Policy, Key | None]:
        policy = self.policies.current()
        return policy, policy.find_key(key) if key and self.open_tenant is None else None

    def _check_limits(self, call: Call, request: ParsedRequest) -> int:
        """Return how many answers a request has, all of which are under way from now on; sets what it forgets."""
        limits, count = self.limits, len(request.prompts) * request.n
        if request.model != self.engine.model:
            message = f"there is no model '{request.model[:100]}' here: expected '{self.engine.model}'"
            raise ApiError(404, message, code="model_not_found", param="model")
        if call.base_only and (request.forget or not self.shows_base):
            raise ApiError(403, "this server does not show the base alone", code="base_not_shown")
        call.forget = {} if call.base_only else call.policy.forget_of(call.tenant, request.forget)
        adds = bool(request.forget) and call.forget != self._own(call)
        call.require(*["add"] * adds, *["logprobs"] * (request.settings["logprobs"] is not None))
        if count > limits.answers:
            message = f"{count} answers in one request: at most {limits.answers}"
            raise ApiError(400, message, code="too_many_answers", param="n")
        self._places.claim(call, count)
        return count

    async def _encode(self, call: Call, request: ParsedRequest) -> list[Generation]:
        limits, generations, loop = self.limits, [], asyncio.get_running_loop()

        def prefilled(seconds: float) -> None:
            with suppress(RuntimeError):  # the event loop has gone
                loop.call_soon_threadsafe(self._leases.charge, call.tenant, _WAIT * seconds)

        longest = min(limits.prompt_tokens, self.engine.context - 1)
        for prompt in request.prompts:
            check_size(prompt, request.variables, longest)
        salt = call.policy.tenants[call.tenant].cache_salt(call.tenant, request.cache_salt)
        grammar, trace = None, {} if self.tracing is None else self.tracing.headers(call)
        if request.schema is not None:
            more = list[float]()  # it is compiled in threads and processes of its own
            grammar = await self.in_turn(call, partial(self.engine.compile, request.schema, more.append), more)
        for prompt in request.prompts:
            ids = await self.in_turn(call, partial(self.engine.encode, prompt, request.variables))
            call.prompt_tokens += len(ids)
            max_tokens = answer_tokens(len(ids), request.max_tokens, limits, self.engine.context)
            settings = {**request.settings, "grammar": grammar, "trace": trace, "cache_salt": salt}
            settings["stop"] += self.engine.chat_ends * is_chat(prompt)
            for n in range(request.n):
                if settings["seed"] is not None:  # n different answers, the same ones each time
                    settings["seed"] = (request.settings["seed"] + n) % 2**63
                generations.append(Generation(ids, max_tokens, call.tenant, prefilled=prefilled, **settings))
        return generations

    async def _produce(
        self, call: Call, request: ParsedRequest, generations: Sequence[Generation], chunks: _Chunks
    ) -> None:
        """Generate all answers into `chunks`. Rows, adapters and places are free when that ends, sent or not."""
        try:
            await self.in_time(call, self._generate_all(call, request, generations, chunks))
        except Exception as error:
            chunks.put_nowait((0, error))
        finally:
            self._places.generated(call)
            self._quotas.charge(call, call.prompt_tokens + call.generated)

    async def _generate_all(
        self, call: Call, request: ParsedRequest, generations: Sequence[Generation], chunks: _Chunks
    ) -> None:
        async with self._leases.place(call.tenant):
            lease = await self._hold(call)
            try:
                asked = {"asked": request.prompts} if self._recorder.keeps_text else {}
                await self._recorder.write("admitted", call, **asked)
                await asyncio.gather(
                    *(self._generate(call, number, one, lease, chunks) for number, one in enumerate(generations))
                )
            finally:
                lease.release()
        self._places.took(time.monotonic() - call.began)

    async def _hold(self, call: Call) -> AdapterLease:
        trust = call.policy.trust_of(call.tenant)
        own = self._own(call)
        added = call.forget.keys() - own.keys()
        lease = await self.engine.hold(call.forget, call.policy, trust, added)
        unsigned = trust is not None and any(adapter.signed_by not in trust.signers for adapter in lease.applied)
        if unsigned or {adapter.name: adapter.strength for adapter in lease.applied} != call.forget:
            lease.release()
            raise Unavailable("the engine has other adapters than the policy requires", ", ".join(call.forget))
        call.applied, call.set_digest = describe(lease.applied), lease.digest
        try:
            await self._canary.check(call, lease, own, added)
        except BaseException:
            lease.release()
            raise
        return lease

    def _own(self, call: Call) -> Mapping[str, float]:
        """Return what is forgotten for a call whatever it asks for; without a policy that is what it asks for."""
        return call.forget if self.open_tenant is not None else call.policy.tenants[call.tenant].forget

    async def _generate(
        self, call: Call, number: int, generation: Generation, lease: AdapterLease, chunks: _Chunks
    ) -> None:
        try:
            place = self._rows.place(call.tenant, generation.size)
            async with place, aclosing(self.engine.stream(generation, lease)) as stream:
                call.placed = call.placed or time.monotonic()
                async for chunk in stream:
                    call.generated += chunk.tokens
                    chunks.put_nowait((number, chunk))
                    if chunk.finish_reason is not None:
                        return
            raise GenerationError("the engine's answer broke off")
        except Exception as error:
            chunks.put_nowait((number, error))

    async def _clean_up(self, call: Call, producer: asyncio.Task[None] | None, client_gone: bool) -> None:
        if producer is not None:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)
        self.leave(call)
        if client_gone:
            await self._recorder.finish(call, 499, "client_gone")

    def _row_share(self) -> float:
        """Return how many rows a tenant may have, so that no other's answer takes more than about twice its time.

        A part of those at half speed is for a tenant that may come, and for the prompts that are read meanwhile.
        """
        if (present := len(self._places.present())) < 2:
            return math.inf
        within = self.engine.stats().half_speed_rows
        return math.inf if within in (None, math.inf) else max(within // (present + 1), 1)

    def _stats(self) -> EngineStats:
        stats = self.engine.stats()
        return stats if stats.running is None else replace(stats, waiting=max(self.active - stats.running, 0))
