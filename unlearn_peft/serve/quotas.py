"""Quotas: how many requests and tokens a tenant has in a window of time, counted in this process's memory.

A window begins with the first request in it. A request is refused when a quota is used up; what its own answers take is
counted when they are generated, so that answers under way may exceed the quota of tokens, by their own tokens at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from .request import ApiError, Call


class Quotas:
    """Counts by tenant; `defaults` ("requests" and "tokens", each as "100/minute") are for whom the policy has none."""

    def __init__(self, defaults: Mapping[str, str]) -> None:
        self._defaults, self._limiter = defaults, FixedWindowRateLimiter(MemoryStorage())

    def admit(self, call: Call) -> None:
        """Count a request.

        Raises:
            ApiError: 429 if one of the tenant's quotas is used up; then it is not counted.
        """
        quotas = dict(self._of(call))
        for kind, item in quotas.items():
            left = self._limiter.get_window_stats(item, kind, call.tenant).reset_time - time.time()
            if left > item.get_expiry() + 1:  # the clock was set back: the window would last until it is there again
                self._limiter.clear(item, kind, call.tenant)
            if not self._limiter.test(item, kind, call.tenant):
                message = f"your quota of {item.amount} {kind} in {item.get_expiry()} s is used up"
                headers = {"Retry-After": str(max(math.ceil(left), 1))}
                raise ApiError(429, message, code=f"quota_{kind}", headers=headers)
        if "requests" in quotas:
            self._limiter.hit(quotas["requests"], "requests", call.tenant)

    def charge(self, call: Call, tokens: int) -> None:
        """Count tokens that a request took."""
        if tokens and "tokens" in (quotas := dict(self._of(call))):
            self._limiter.hit(quotas["tokens"], "tokens", call.tenant, cost=tokens)

    def _of(self, call: Call) -> Iterator[tuple[str, RateLimitItem]]:
        for kind, quota in {**self._defaults, **call.policy.tenants[call.tenant].quotas}.items():
            yield kind, _item(quota)


@lru_cache(maxsize=1000)
def _item(quota: str) -> RateLimitItem:
    return parse(quota)
