"""Places that tenants get in turn, so that the flood of one delays another by no more than what has a place already."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairQueue:
    """A semaphore that serves waiting tenants round robin, and the requests of one in their order.

    Args:
        places: that can be taken at once.
        per_tenant: of these, what one tenant can have; all by default.
    """

    def __init__(self, places: int, per_tenant: int | None = None) -> None:
        self._free, self._per_tenant = places, places if per_tenant is None else per_tenant
        self._taken = Counter[str]()
        self._waiting = OrderedDict[str, deque[asyncio.Future[None]]]()  # the tenant whose turn it is comes first

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a place, and have it until the block ends."""
        await self.acquire(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    async def acquire(self, tenant: str) -> None:
        """Wait for a place; `release` gives it back."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant, turn)
            else:  # it was given at this very moment
                self.release(tenant)
            raise

    def release(self, tenant: str) -> None:
        """Give a place back; the next tenant gets it at once."""
        self._free += 1
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._give()

    def _give(self) -> None:
        while self._free and (tenant := self._next()) is not None:
            turn = self._waiting[tenant].popleft()
            self._waiting.move_to_end(tenant)
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            if not turn.done():
                turn.set_result(None)
                self._free -= 1
                self._taken[tenant] += 1

    def _next(self) -> str | None:
        return next((tenant for tenant in self._waiting if self._taken[tenant] < self._per_tenant), None)

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(tenant)
        if turns and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[tenant]
