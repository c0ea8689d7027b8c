"""The embedded engine: one base in this process, a bank of adapters, a scheduler.

An adapter is known to the bank by its name, path and digest together, so that a changed policy never gives a request
another version than its own policy names, and requests that run keep theirs to their end.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.read import read_bundle
from ...errors import UnlearnError
from ...inference.bank import Applied, Bank
from ...models.base import Base
from .base import AdapterLease, EngineStats, Generation, TextChunk, Unavailable
from .encode import Prompt, Prompts
from .scheduler import ActiveRow, Scheduler

if TYPE_CHECKING:
    from ...adapters.trust import Trust
    from ..policy.policy import Policy


_POLICIES_KEPT = 4  # versions whose requests may still be on their way here


class LocalLease:
    """A request's set; kept until the request and all of its rows have let go."""

    def __init__(self, held: Any, applied: tuple[Applied, ...]) -> None:
        self.held, self.applied, self.digest = held, applied, str(held.digest)
        self._users, self._lock, self._released = 1, threading.Lock(), False

    def keep(self) -> None:
        """One user more; each calls `drop` when it needs the set no longer."""
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.held.release()

    def release(self) -> None:
        """The request is over; a second call does nothing."""
        with self._lock:
            again, self._released = self._released, True
        if not again:
            self.drop()


class LocalEngine:
    """Generates with a base in this process.

    Args:
        base: the model; its forward passes belong to the scheduler's thread from now on.
        name: the public name; the base's own by default.
        max_batch: answers that are generated at once.
        budget_bytes: memory for adapters; None: no bound.
        allow_different_base: also take adapters whose noted base differs (unsafe).
        trust: whose signatures are taken, and whether adapters need one.

    Raises:
        BaseModelError: if the base cannot be served so.
    """

    def __init__(
        self,
        base: Base,
        *,
        name: str | None = None,
        max_batch: int = 8,
        budget_bytes: int | None = None,
        allow_different_base: bool = False,
        trust: Trust | None = None,
    ) -> None:
        self.model = name or base.name
        self.context = int(getattr(base.model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
        self._prompts = Prompts(base.tokenizer, base.model.get_input_embeddings().weight.shape[0], self.model)
        self._different = allow_different_base
        self.bank = Bank(base.model, base.tokenizer, budget_bytes=budget_bytes, trust=trust)
        self.scheduler = Scheduler(base.model, copy.deepcopy(base.tokenizer), self.bank, max_batch=max_batch)
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="unlearn-peft engine")
        self._registering = threading.Lock()
        self._known: OrderedDict[str, set[str]] = OrderedDict()  # recent policies' versions -> their keys in the bank
        self._first: dict[str, str] = {}  # key -> the identity that it was first read with

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._prompts, prompt)

    async def hold(self, forget: Mapping[str, float], policy: Policy, trust: Trust | None = None) -> LocalLease:
        """See `Engine.hold`; adapters are read in a thread, so that nobody else waits."""
        holding = asyncio.get_running_loop().run_in_executor(self._threads, self._hold, forget, policy, trust)
        try:
            return await asyncio.shield(holding)
        except asyncio.CancelledError:  # the client has gone; the thread goes on, and nobody else would let go
            holding.add_done_callback(_let_go)
            raise

    async def stream(self, request: Generation, holding: AdapterLease) -> AsyncGenerator[TextChunk, None]:
        """See `Engine.stream`."""
        assert isinstance(holding, LocalLease)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[TextChunk | Exception]()

        def deliver(piece: TextChunk | Exception) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        row = ActiveRow(request, holding.held, deliver, holding.drop)
        holding.keep()
        self.scheduler.submit(row)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
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
        )  # fmt: skip

    async def close(self) -> None:
        """See `Engine.close`."""
        await asyncio.to_thread(self.scheduler.close)
        self._threads.shutdown(wait=False)

    def _hold(self, forget: Mapping[str, float], policy: Policy, trust: Trust | None) -> LocalLease:
        keys = {_key(name, policy): name for name in forget}
        try:
            self._register(policy)
            held = self.bank.hold({key: forget[name] for key, name in keys.items()})
        except Exception as error:  # also what a folder that vanishes while it is read may raise
            key = getattr(error, "adapter", None) or ""
            name = keys.get(key, ", ".join(forget))
            raise Unavailable(str(error).replace(key, name) if key else str(error), name) from error
        applied = []
        for one, part in zip(held.applied, held.parts, strict=True):
            name, bundle = keys[one.name], part.adapter.bundle
            applied.append(one._replace(name=name))
            named = policy.adapters[name].sha256 in (None, bundle.identity)
            if not named or self._first.setdefault(one.name, bundle.identity) != bundle.identity:
                held.release()
                self._read_anew(name, policy)
                raise Unavailable(
                    f"the adapter '{name}' in {policy.adapters[name].path} is not the one that the policy names or "
                    "that was read at first. Put that back, or let the policy name the new one's sha256",
                    name,
                )
            if trust is None:
                continue
            try:
                applied[-1] = applied[-1]._replace(signed_by=trust.check(bundle))
            except Exception as error:
                held.release()
                if _well_signed(bundle.path, trust):  # it has been mended since it was read
                    self._read_anew(name, policy)
                raise Unavailable(str(error), name) from error
        return LocalLease(held, tuple(applied))

    def _read_anew(self, name: str, policy: Policy) -> None:
        """Keep no adapter that was refused: when it is asked for next, the right one may lie there again."""
        with self._registering:
            key = _key(name, policy)
            if key in self.bank.known:
                self.bank.remove(key)
                self.bank.register(key, policy.adapters[name].path, allow_different_base=self._different)

    def _register(self, policy: Policy) -> None:
        """Make a policy's adapters known, and forget those that no recent policy names."""
        with self._registering:
            if policy.version in self._known:
                self._known.move_to_end(policy.version)
                return
            old = set[str]().union(*self._known.values())
            self._known[policy.version] = {_key(name, policy) for name in policy.adapters}
            if len(self._known) > _POLICIES_KEPT:
                self._known.popitem(last=False)
            now = set[str]().union(*self._known.values())
            for name, entry in policy.adapters.items():
                if (key := _key(name, policy)) not in old:
                    self.bank.register(key, entry.path, allow_different_base=self._different)
            for key in old - now:
                self.bank.remove(key)


def _let_go(done: asyncio.Future[LocalLease]) -> None:
    if not done.cancelled() and done.exception() is None:
        done.result().release()


def _well_signed(folder: Path, trust: Trust) -> bool:
    try:
        return read_bundle(folder, trust=trust).signed_by is not None
    except UnlearnError:
        return False


def _key(name: str, policy: Policy) -> str:
    entry = policy.adapters[name]
    return f"{name}@{hashlib.sha256(repr((entry.path, entry.sha256)).encode()).hexdigest()[:16]}"
