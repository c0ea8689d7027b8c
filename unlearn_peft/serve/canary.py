"""The canary: before a set of adapters is first served, each adapter's probes are asked in it.

An adapter can take away what another one does: one with a negated scale, or one that was trained to oppose. A probe is
a question with words that must not be in the answer. One that leaks with the whole set, and not with its adapter alone
at the strength of the policy, has come back. What then happens is the policy's choice for that adapter: the set is
refused, or that is only logged. A few greedy answers show what comes back there, not that nothing does elsewhere.

Each exact set (contents and strengths) is checked once, through the engine, in rows of the tenant whose request was
first; further requests of that tenant for it wait. A tenant's sets are checked one at a time, and nobody waits for what
another tenant's requests began: that could take as long as that one's own. Neither probes nor answers are logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..adapters.read import read_identity
from ..data.rows import read_rows
from ..data.source import Row
from ..data.words import said
from ..errors import AdapterError, DataError, OutputError, safe_repr
from ..files.untrusted import read_file
from .engine.base import AdapterLease, Engine, Generation, GenerationError, Unavailable
from .fair_queue import FairQueue
from .metrics import Metrics
from .policy.entries import AdapterEntry
from .request import ApiError, Call

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MAX_BYTES, MAX_PROBES = 1_000_000, 100  # of a file of probes
_ANSWER_TOKENS = 64
_MAX_CACHED = 10_000  # verdicts, and as many counts of answers that verdicts are made of
Shape = tuple[str, float, str]  # an adapter's sha256, its strength in the policy, the sha256 of its probes


@dataclass(frozen=True)
class Probes:
    """The probes of an adapter."""

    rows: tuple[Row, ...]
    sha256: str


@dataclass(frozen=True)
class Leaks:
    """How many probes of an adapter leak: in the base, with the adapter alone, and back again in the whole set."""

    probes: int
    base: int
    alone: int
    back: int


@dataclass(frozen=True)
class _Watched:
    """An adapter of a set whose probes are to be asked."""

    name: str
    shape: Shape
    probes: Probes
    refuses: bool


class Canary:
    """Checks sets, and keeps what it found.

    Args:
        engine: answers the probes.
        rows: where an answer waits for its place in the batch.
        record: writes a line of the audit log about a call; may raise OutputError.
        metrics: where checks are counted.
        seconds: that one check may take.
    """

    def __init__(
        self, engine: Engine, rows: FairQueue, record: Callable[..., Awaitable[None]], metrics: Metrics, seconds: float
    ) -> None:
        self._engine, self._rows, self._record, self._metrics = engine, rows, record, metrics
        self._seconds = seconds
        self._verdicts = Bounded[Mapping[Shape, Leaks]](_MAX_CACHED)
        self._answers = Bounded[tuple[bool, ...]](_MAX_CACHED)  # of the base, and of adapters alone
        self._running: dict[Hashable, asyncio.Task[Mapping[Shape, Leaks]]] = {}  # by set and tenant
        self._turns = FairQueue(math.inf, per_tenant=1)

    async def check(self, call: Call, lease: AdapterLease, own: Mapping[str, float], added: Collection[str]) -> None:
        """Let a call go on with its set, or refuse it; sets `call.leaks`.

        Args:
            call: its `forget` is the set.
            lease: on the set.
            own: what the policy has forgotten for its tenant: adapter -> strength.
            added: adapters that only the request asks for.

        Raises:
            ApiError: probes leak in this set, 403 if the request adds anything to the tenant's own, else 503.
            Unavailable: that cannot be found out.
            OutputError: what was found cannot be recorded.
        """
        if len(call.forget) < 2 and all(own.get(name, strength) == strength for name, strength in call.forget.items()):
            return  # nothing is beside it, and it is as strong as in the policy
        watched = await asyncio.to_thread(_watch, call, lease, own)
        if not watched:
            return
        key = (lease.digest, frozenset(one.shape for one in watched))
        verdict = self._verdicts.get(key)
        if verdict is None:
            try:
                verdict = await self._check_once(key, call, lease, watched, added)
            except (Unavailable, OutputError):
                raise
            except Exception as error:
                if strict := [one.name for one in watched if one.refuses]:
                    raise Unavailable(f"its canary could not be asked: {_reason(error)}", strict[0]) from error
                logger.warning("a set was not checked, and is served: %s", _reason(error))
                return
        back = [one for one in watched if verdict[one.shape].back]
        call.leaks = tuple(one.name for one in back)
        if refusing := [one.name for one in back if one.refuses]:
            names = ", ".join(f"'{name}'" for name in refusing)
            if call.forget != own:
                message = f"with what this request adds, what {names} forgets comes back: add less, or something else"
                raise ApiError(403, message, code="canary_leaks", param="forget", adapter=refusing[0])
            message = f"the adapters of this tenant undo {names}, so this request is refused"
            raise ApiError(503, message, code="canary_leaks", adapter=refusing[0])

    async def _check_once(
        self, key: Hashable, call: Call, lease: AdapterLease, watched: Sequence[_Watched], added: Collection[str]
    ) -> Mapping[Shape, Leaks]:
        """Wait for the check of a set, begun if need be; then it goes on when its clients have gone."""
        running = (key, call.tenant)
        if running not in self._running:
            await self._turns.acquire(call.tenant)
            if (verdict := self._verdicts.get(key)) is not None:
                self._turns.release(call.tenant)
                return verdict
            work = self._ask_all(key, call, lease.digest, watched, added)
            task = self._running[running] = asyncio.ensure_future(asyncio.wait_for(work, self._seconds))

            def ended(done: asyncio.Task[Any]) -> None:
                del self._running[running]
                self._turns.release(call.tenant)
                if not done.cancelled() and done.exception() is not None:
                    self._metrics.canary.labels("failed").inc()

            task.add_done_callback(ended)
        return await asyncio.shield(self._running[running])

    async def _ask_all(
        self, key: Hashable, call: Call, digest: str, watched: Sequence[_Watched], added: Collection[str]
    ) -> Mapping[Shape, Leaks]:
        found = dict[Shape, Leaks]()
        for one in watched:
            sha256, strength, probes = one.shape
            base = self._answers.get(probes)
            if base is None:
                base = self._answers.put(probes, await self._ask(call, {}, "", one.probes, added))
                if not any(base):
                    logger.warning("the base answers no probe of '%s': its canary shows nothing", one.name)
            alone = self._answers.get(one.shape)
            if alone is None:
                alone = await self._ask(call, {one.name: strength}, None, one.probes, added)
                self._answers.put(one.shape, alone)
            whole = await self._ask(call, call.forget, digest, one.probes, added)
            back = sum(leaks and not before for leaks, before in zip(whole, alone, strict=True))
            found[one.shape] = Leaks(len(whole), sum(base), sum(alone), back)
        leaking = [one for one in watched if found[one.shape].back]
        await self._record("canary", call, canary={one.name: asdict(found[one.shape]) for one in watched})
        for one in leaking:
            logger.warning(
                "canary: with %s, %d of %d probes of '%s' leak again; %s",
                ", ".join(f"{name}={strength:g}" for name, strength in call.forget.items()),
                found[one.shape].back, found[one.shape].probes, one.name,
                "refused" if one.refuses else "served all the same",
            )  # fmt: skip
        self._metrics.canary.labels("leaked" if leaking else "passed").inc()
        return self._verdicts.put(key, found)

    async def _ask(
        self, call: Call, forget: Mapping[str, float], digest: str | None, probes: Probes, added: Collection[str]
    ) -> tuple[bool, ...]:
        """Return for each probe whether its greedy answer leaks with a set, whose digest must be that (None: any)."""
        trust = call.policy.trust_of(call.tenant)
        lease = await self._engine.hold(forget, call.policy, trust, forget.keys() & added)
        try:
            if digest not in (None, lease.digest):
                raise Unavailable("the adapters of a set changed while its canary was asked", next(iter(forget), None))
            answers = (self._leaks(call, lease, row) for row in probes.rows)
            results = await asyncio.gather(*answers, return_exceptions=True)
        finally:
            lease.release()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return tuple(result is True for result in results)

    async def _leaks(self, call: Call, lease: AdapterLease, row: Row) -> bool:
        ids = await asyncio.to_thread(self._engine.encode, [{"role": "user", "content": row["prompt"]}])
        count = min(_ANSWER_TOKENS, self._engine.context - len(ids))
        if count < 1:
            raise DataError(f"a probe has {len(ids)} tokens, and this base takes {self._engine.context}")
        generation, text = Generation(ids, count, temperature=0.0, stop=self._engine.chat_ends), ""
        place = self._rows.place(call.tenant, generation.size)
        async with place, aclosing(self._engine.stream(generation, lease)) as stream:
            async for chunk in stream:
                text += chunk.text
                if chunk.finish_reason is not None:
                    return bool(said(text, row["leak"]))
        raise GenerationError("the engine's answer broke off")


def read_probes(path: Path) -> Probes:
    """Read an adapter's probes: JSON lines with `prompt` and `leak`; of a file that has not changed, from memory.

    Raises:
        DataError: the file cannot be used.
    """
    try:
        state = os.stat(path)
        return _read_probes(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino)
    except OSError as error:
        raise DataError(f"cannot read the probes {path}: {error.strerror}") from None
    except AdapterError as error:
        raise DataError(str(error)) from None


def check_adapter(path: str | Path, sha256: str | None = None, probes: str | Path | None = None) -> str:
    """Read what a policy is to name, and return the adapter's `Bundle.identity`, to be pinned.

    Raises:
        AdapterError: see `read_identity`; or a path has other than printable characters.
        DataError: see `read_probes`.
    """
    for given in filter(None, (path, probes)):
        if not str(given).isprintable():
            raise AdapterError(f"{safe_repr(str(given))} is no path: expected printable characters")
    identity = read_identity(path, sha256)
    if probes is not None:
        read_probes(Path(probes))
    return identity


def idle_note(name: str, entry: AdapterEntry) -> str | None:
    """Return that an adapter's `canary` is without effect, since it has no probes; or None. Looks for files."""
    if entry.canary in (None, "off") or entry.probes_path:
        return None
    return f"the canary of '{name}' has no effect: it has no probes, expected {entry.path}.probes.jsonl or `probes`"


@lru_cache(maxsize=1000)
def _read_probes(path: Path, *_version: int) -> Probes:
    data = read_file(path, _MAX_BYTES)
    try:
        rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
    except (ValueError, RecursionError):
        raise DataError(f"the probes {path} are not JSON lines: expected prompt and leak in each") from None
    if len(rows) > MAX_PROBES:
        raise DataError(f"{path} has {len(rows)} probes: at most {MAX_PROBES}, since each new set is asked all of them")
    return Probes(tuple(read_rows(rows, "probes")), hashlib.sha256(data).hexdigest())


def _watch(call: Call, lease: AdapterLease, own: Mapping[str, float]) -> list[_Watched]:
    """Return the adapters of a set that have probes.

    Raises:
        Unavailable: probes cannot be read, and their policy does not say `warn`.
    """
    watched = []
    for applied in lease.applied:
        entry, strength = call.policy.adapters[applied.name], own.get(applied.name, applied.strength)
        path = None if entry.canary == "off" else entry.probes_path
        if path is None:
            _log_idle(applied.name, entry)
            continue
        try:
            probes = read_probes(path)
        except DataError as error:
            if entry.canary != "warn":
                raise Unavailable(f"its canary cannot be asked: {error}", applied.name) from error
            logger.warning("'%s' has no canary: %s", applied.name, error)
            continue
        shape = (applied.sha256, strength, probes.sha256)
        watched.append(_Watched(applied.name, shape, probes, entry.canary != "warn"))
    return watched


@lru_cache(maxsize=1000)
def _log_idle(name: str, entry: AdapterEntry) -> None:
    if note := idle_note(name, entry):
        logger.warning("%s", note)


def _reason(error: Exception) -> str:
    return "it took too long" if isinstance(error, asyncio.TimeoutError) else str(error)


class Bounded(Generic[T]):
    """What was used last, by key."""

    def __init__(self, size: int) -> None:
        self._size, self._entries = size, OrderedDict[Hashable, T]()

    def get(self, key: Hashable) -> T | None:
        """Return an entry, if it is still there."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, value: T) -> T:
        """Keep an entry, and return it; the one that was used longest ago goes."""
        self._entries[key] = value
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return value
