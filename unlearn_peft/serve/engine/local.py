"""The embedded engine: one base in this process, a bank of adapters, a scheduler.

An adapter is known to the bank by its name, path and digest together, so that a changed policy never gives a request
another version than its own policy names, and running requests keep theirs to their end.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...adapters.bundle import Bundle
from ...adapters.read import read_bundle
from ...errors import BaseModelError, UnlearnError
from ...inference.adapter_cache import AdapterLease, Applied
from ...inference.bank import Bank
from ...models.base import Base
from . import base as protocol
from .base import EngineStats, Generation, TextChunk, Unavailable
from .encode import Prompt, Prompts
from .grammar import Grammar, Grammars
from .memory import context_of
from .rows import ActiveRow
from .scheduler import Scheduler
from .threads import compute_alone

if TYPE_CHECKING:
    from ...adapters.trust import Trust
    from ..policy.policy import Policy

logger = logging.getLogger(__name__)
_MIN_KV_TOKENS = 64  # a short question and its answer
_MAX_POLICIES = 4  # versions whose requests may still be on their way here
_HALF_SPEED_ROWS = 6.0  # as long as that is not known: as on a CPU


class LocalEngine:
    """Generates with a base in this process, whose forward passes belong to the scheduler's thread from now on.

    On a CPU it is twice as fast where the base was loaded in a thread that has ended, see `threads.py`.

    Args:
        name: the public name; the base's own by default.
        max_batch: answers that are generated at once.
        kv_bytes: for keys and values, see `Scheduler`.
        prefix_cache: whether what prompts begin with is kept, for requests of the same tenant with the same set.
        budget_bytes, trust: see `Bank`.
        allow_different_base: see `attach`.

    Raises:
        BaseModelError: see `ModelRunner`; or there is no room for the keys and values of one answer.
    """

    def __init__(
        self,
        base: Base,
        *,
        name: str | None = None,
        max_batch: int = 8,
        kv_bytes: int | None = None,
        prefix_cache: bool = True,
        budget_bytes: int | None = None,
        allow_different_base: bool = False,
        trust: Trust | None = None,
    ) -> None:
        self.model = name or base.name
        self._prompts = Prompts(base.tokenizer, base.model.get_input_embeddings().weight.shape[0], self.model)
        self.chat_ends = self._prompts.ends
        self._allow_different_base = allow_different_base
        self.bank = Bank(base.model, base.tokenizer, budget_bytes=budget_bytes, trust=trust)
        tokenizer = copy.deepcopy(base.tokenizer)
        self.scheduler = Scheduler(base.model, tokenizer, self.bank, max_batch=max_batch, kv_bytes=kv_bytes)
        self.kv_tokens, self._keeps_prefixes = self.scheduler.kv_tokens, prefix_cache
        self.context = _context(context_of(base.model.config), self.kv_tokens)
        self._grammars = Grammars(self._prompts.copied_tokenizer, self._prompts.vocab_size, self.scheduler.ends)
        self._threads = ThreadPoolExecutor(8, "unlearn-peft engine", initializer=compute_alone)
        self._registering = threading.Lock()
        self._recent: OrderedDict[str, set[str]] = OrderedDict()  # policy versions -> their adapters' keys in the bank
        self._identities: dict[str, str] = {}  # key -> the identity that it was first read with

    def encode(self, prompt: Prompt, variables: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._prompts(prompt, variables)

    def compile(self, schema: str, took: Callable[[float], None] = lambda seconds: None) -> Grammar:
        """See `Engine.compile`."""
        return self._grammars.compile(schema, took).result()

    async def hold(
        self, forget: Mapping[str, float], policy: Policy, trust: Trust | None = None, added: Collection[str] = ()
    ) -> AdapterLease:
        """See `Engine.hold`; adapters are read in a thread, so that nobody else waits."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._hold, forget, policy, trust, added)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:  # the client has gone; the thread goes on, and nobody else would let go
            future.add_done_callback(_release)
            raise

    def set_trust(self, trust: Trust) -> None:
        """See `Engine.set_trust`."""
        self.bank.trust = trust

    async def stream(self, request: Generation, lease: protocol.AdapterLease) -> AsyncGenerator[TextChunk, None]:
        """See `Engine.stream`."""
        assert isinstance(lease, AdapterLease)
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue[TextChunk | Exception]()

        def deliver(chunk: TextChunk | Exception) -> None:
            loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        row_lease = lease.copy()  # a cancelled row is in the batch until the next step, its request may end before
        if not self._keeps_prefixes:
            request = replace(request, cache_salt=None)
        row = ActiveRow(request, row_lease, deliver, row_lease.release)
        self.scheduler.submit(row)
        try:
            while True:
                chunk = await chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self.scheduler.cancel(row)

    async def problem(self) -> str | None:
        """See `Engine.problem`."""
        return None if self.scheduler.alive else "the scheduler has stopped"

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        bank = self.bank.stats
        return EngineStats(
            running=self.scheduler.running, waiting=self.scheduler.waiting, resident=bank.resident,
            resident_bytes=bank.resident_bytes, loads=bank.loads, load_seconds=bank.load_seconds,
            kv_used_bytes=self.scheduler.kv_used_bytes, kv_bytes=self.scheduler.kv_bytes,
            prefix_bytes=self.scheduler.prefixes.bytes, prefix_tokens=self.scheduler.reused,
            half_speed_rows=self.scheduler.step_times.rows_within(2.0) or _HALF_SPEED_ROWS,
        )  # fmt: skip

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.to_thread(self.scheduler.close)
        self._threads.shutdown(wait=False)
        self._grammars.close()

    def _hold(
        self, forget: Mapping[str, float], policy: Policy, trust: Trust | None, added: Collection[str]
    ) -> AdapterLease:
        keys = {_key(name, policy): name for name in forget}
        try:
            self._register(policy)
            strengths = {key: forget[name] for key, name in keys.items()}
            lease = self.bank.hold(strengths, [key for key, name in keys.items() if name in added])
        except Exception as error:  # also what a folder that vanishes while it is read may raise
            key = getattr(error, "adapter", None) or ""
            name = keys.get(key, ", ".join(forget))
            raise Unavailable(str(error).replace(key, name) if key else str(error), name) from error
        try:
            lease.applied = tuple(
                self._check(applied._replace(name=keys[applied.name]), part.adapter.bundle, policy, trust)
                for applied, part in zip(lease.applied, lease.parts, strict=True)
            )
        except BaseException:
            lease.release()
            raise
        return lease

    def _check(self, applied: Applied, bundle: Bundle, policy: Policy, trust: Trust | None) -> Applied:
        """Check an adapter against what the policy names and the tenant trusts; adds who signed it."""
        name, entry = applied.name, policy.adapters[applied.name]
        if (
            entry.sha256 not in (None, bundle.identity)
            or self._identities.setdefault(_key(name, policy), bundle.identity) != bundle.identity
        ):
            self._read_anew(name, policy)
            raise Unavailable(
                f"the adapter '{name}' in {entry.path} is not the one that the policy names or that was read at first. "
                "Put that back, or let the policy name the new one's sha256",
                name,
            )
        for required in (self.bank.trust, trust):  # the server's may have changed since the bank read it
            if required is None:
                continue
            try:
                applied = applied._replace(signed_by=required.check(bundle))
            except Exception as error:
                with suppress(UnlearnError):
                    if read_bundle(bundle.path, trust=required).signed_by is not None:  # mended since it was read
                        self._read_anew(name, policy)
                raise Unavailable(str(error), name) from error
        return applied

    def _read_anew(self, name: str, policy: Policy) -> None:
        """Keep no adapter that was refused: when it is asked for next, the right one may lie there again."""
        with self._registering:
            key = _key(name, policy)
            if key in self.bank.known:
                self.bank.remove(key)
                self.bank.register(key, policy.adapters[name].path, allow_different_base=self._allow_different_base)
        self.scheduler.prefixes.drop(lambda owner: any(name == part[0] for part in owner.adapters))

    def _register(self, policy: Policy) -> None:
        """Make a policy's adapters known, and forget those that no recent policy names."""
        with self._registering:
            if policy.version in self._recent:
                self._recent.move_to_end(policy.version)
                return
            before = set[str]().union(*self._recent.values())
            self._recent[policy.version] = {_key(name, policy) for name in policy.adapters}
            if len(self._recent) > _MAX_POLICIES:
                self._recent.popitem(last=False)
            for name, entry in policy.adapters.items():
                if (key := _key(name, policy)) not in before:
                    self.bank.register(key, entry.path, allow_different_base=self._allow_different_base)
            for key in before.difference(*self._recent.values()):
                self.bank.remove(key)
        self.scheduler.prefixes.drop(lambda owner: not all(self._is_current(part, policy) for part in owner.adapters))

    def _is_current(self, part: tuple[str, str, float], policy: Policy) -> bool:
        """Whether an adapter that something was computed with is the one that a policy names."""
        name, sha256, _ = part
        return name in policy.adapters and self._identities.get(_key(name, policy)) == sha256


def _context(longest: int, kv_tokens: int) -> int:
    """Return how many tokens a prompt and its answer may have, of a model that takes `longest`."""
    if kv_tokens < min(longest, _MIN_KV_TOKENS):
        raise BaseModelError(
            f"the memory for keys and values has room for {kv_tokens} tokens, expected {_MIN_KV_TOKENS} or more: give "
            "more (--kv-memory-gb), or free some"
        )
    if kv_tokens < longest:
        logger.warning(
            "The memory for keys and values has room for %d tokens: longer prompts, with their answers, are refused, "
            "though the base takes %d (--kv-memory-gb)", kv_tokens, longest,
        )  # fmt: skip
    return min(longest, kv_tokens)


def _release(done: asyncio.Future[AdapterLease]) -> None:
    if not done.cancelled() and done.exception() is None:
        done.result().release()


def _key(name: str, policy: Policy) -> str:
    entry = policy.adapters[name]
    return f"{name}@{hashlib.sha256(repr((entry.path, entry.sha256)).encode()).hexdigest()[:16]}"
