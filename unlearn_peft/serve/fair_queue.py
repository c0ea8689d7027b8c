"""Places that tenants get in turn, so that the flood of one delays another by no more than what has a place already.

A place can have a size. Those that are taken have room together, each as large as the largest of them: rows of a batch
are padded to its longest. Who finds no room is overtaken by others for a while, and then they wait for it.

What a tenant did with a place can be charged to it: then it gets no further one for a while, so that others have their
part of the processor, too. While it waits it holds no place.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_LOOK_AGAIN = 0.25  # seconds, whether those are still there for whom a tenant waits
_MANY = 1024  # tenants whose charges are kept before those that are over are looked for


@dataclass(eq=False)
class _Turn:
    """Somebody who waits for a place."""

    size: int
    given: asyncio.Future[None]
    overtaken: int = 0  # by how many, for want of room


class FairQueue:
    """A semaphore that serves waiting tenants round robin, and the requests of one in their order.

    Args:
        places: that can be taken at once.
        per_tenant: of these, what one tenant can have; all by default.
        spare: of these, what only tenants get that have none yet.
        burst: seconds that may be charged to a tenant before it waits.
        room: for the sizes of places, none of which may be larger; None: they don't matter. Where there are `spare`
            places, a tenant that has some leaves room for one more.
        present: the tenants for whom another waits: not one that was charged less than each of them. None: all wait.
        share: what one tenant can have at the moment, at least 1; None: as ever.
    """

    def __init__(
        self, places: float, per_tenant: float | None = None, *, spare: int = 0, burst: float = 0.0,
        room: int | None = None, present: Callable[[], Collection[str]] | None = None,
        share: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        self._free, self._per_tenant = places, places if per_tenant is None else per_tenant
        self._spare, self._burst, self._present, self._share = spare, burst, present, share
        self._room, self._sizes, self._patience = room, Counter[int](), places
        self._charged = dict[str, float]()  # until when, by the monotonic clock
        self._timer: asyncio.TimerHandle | None = None
        self._taken = Counter[str]()
        self._waiting = OrderedDict[str, deque[_Turn]]()  # the tenant whose turn it is comes first

    @asynccontextmanager
    async def place(self, tenant: str, size: int = 0) -> AsyncIterator[None]:
        """Wait for a place, and have it until the block ends."""
        await self.acquire(tenant, size)
        try:
            yield
        finally:
            self.release(tenant, size)

    async def acquire(self, tenant: str, size: int = 0) -> None:
        """Wait for a place; `release` gives it back."""
        turn = _Turn(size, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()
        try:
            await turn.given
        except asyncio.CancelledError:
            if turn.given.cancelled():
                self._forget(tenant, turn)
            else:  # it was given at this very moment
                self.release(tenant, size)
            raise

    def release(self, tenant: str, size: int = 0) -> None:
        """Give a place back; the next tenant gets it at once."""
        self._free += 1
        self._sizes -= Counter([size])
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._give()

    def charge(self, tenant: str, seconds: float) -> None:
        """Give a tenant no further place for so long, beyond its burst; charges add up."""
        now = time.monotonic()
        if len(self._charged) >= _MANY:
            self._charged = {name: until for name, until in self._charged.items() if until > now}
        self._charged[tenant] = max(self._charged.get(tenant, now), now) + seconds

    def _give(self) -> None:
        while self._free and (tenant := self._next()) is not None:
            turn = self._waiting[tenant].popleft()
            self._waiting.move_to_end(tenant)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if not turn.given.done():
                turn.given.set_result(None)
                self._free -= 1
                self._sizes[turn.size] += 1
                self._taken[tenant] += 1

    def _next(self) -> str | None:
        waits, overtaken = list[float](), list[_Turn]()
        most = self._per_tenant if self._share is None else min(self._per_tenant, self._share())
        for tenant, turns in self._waiting.items():
            taken = self._taken[tenant]
            if taken < most and (not taken or self._free > self._spare):
                if (wait := self._wait(tenant)) > 0:
                    waits.append(wait)
                elif self._has_room(turns[0], taken):
                    for turn in overtaken:
                        turn.overtaken += 1
                    return tenant
                elif not taken:
                    if turns[0].overtaken >= self._patience:
                        return None  # what is free stays so, until it is enough
                    overtaken.append(turns[0])
        if waits and (self._timer is None or self._timer.when() - asyncio.get_running_loop().time() > min(waits)):
            self._look_again(min(waits))
        return None

    def _has_room(self, turn: _Turn, taken: int) -> bool:
        if self._room is None:
            return True
        count = sum(self._sizes.values()) + 1 + (1 if taken and self._spare else 0)
        return count * max([turn.size, *self._sizes]) <= self._room

    def _wait(self, tenant: str) -> float:
        """Return for how many seconds a tenant gets no place, at least."""
        until = self._charged.get(tenant, 0.0)
        wait = until - self._burst - time.monotonic()
        if wait <= 0 or self._present is None:
            return wait
        least = all(self._charged.get(other, 0.0) >= until for other in self._present())
        return 0.0 if least else min(wait, _LOOK_AGAIN)

    def _look_again(self, seconds: float) -> None:
        def look() -> None:
            self._timer = None
            self._give()

        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, look)

    def _forget(self, tenant: str, turn: _Turn) -> None:
        turns = self._waiting.get(tenant)
        if turns and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[tenant]
            self._give()  # others may have waited for it


def in_thread(
    queue: FairQueue, tenant: str, work: Callable[[], T], price: Callable[[float], float]
) -> asyncio.Future[T]:
    """Do something in a thread, with a place that its tenant has already; it is free when that has ended.

    The tenant is charged the `price` of the seconds of a processor that it took.
    """
    took = 0.0

    def timed() -> T:
        nonlocal took
        began = time.thread_time()
        try:
            return work()
        finally:
            took = time.thread_time() - began

    def ended(done: asyncio.Future[T]) -> None:
        queue.charge(tenant, price(took))
        queue.release(tenant)
        if not done.cancelled():
            done.exception()  # it was seen, where somebody still waits

    task = asyncio.ensure_future(asyncio.to_thread(timed))
    task.add_done_callback(ended)
    return task
