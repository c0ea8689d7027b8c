"""What is remembered of API keys: when each was last used, and, in the server's log, that some were refused."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import datetime, timezone

from ..errors import PolicyError
from .policy.policy import Key, KeyUses, PolicySource
from .request import ApiError, new_id

logger = logging.getLogger(__name__)
_FLUSH_SECONDS = 60.0  # between two writes: what a crash loses at most
_MAX_USES = 10_000  # keys in one write; of further ones within it the use is not noted
_LOG_SECONDS = 1.0  # between two lines about refused keys


class KeyLog:
    """Notes last uses in a policy source that keeps them (a store), together and at most once a minute."""

    def __init__(self, policies: PolicySource) -> None:
        self._store = policies if isinstance(policies, KeyUses) else None
        self._uses = dict[str, str]()
        self._flushing: asyncio.Task[None] | None = None
        self._failed = False
        self._logged_at, self._unlogged = float("-inf"), 0

    def check(self, found: Key | None, client: str | None, *, given: bool) -> Key:
        """Return the key that a request came with, noted as used; `given`: it came with any.

        Raises:
            ApiError: 401 without a known key that is not over. That is logged, without the key.
        """
        if found is not None and not found.entry.expired:
            self._use(found.digest)
            return found
        if found is not None:
            what = f"the expired key {found.id} of tenant '{found.tenant}'"
            error = ApiError(401, f"this API key ended at {found.entry.expires}", code="expired_api_key")
        else:
            what = "an unknown key" if given else "a request without a key"
            message = "this API key is not known" if given else "an API key is needed: Authorization: Bearer KEY"
            error = ApiError(401, message, code="invalid_api_key")
        error.headers |= {"WWW-Authenticate": "Bearer", "x-request-id": new_id()}
        self._log_refused(what, client, error.headers["x-request-id"])
        raise error

    def _use(self, digest: str) -> None:
        """Note that a key is used now; it is written within a minute, or when the server ends."""
        if self._store is None or (len(self._uses) >= _MAX_USES and digest not in self._uses):
            return
        self._uses[digest] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush_later())

    def _log_refused(self, what: str, client: str | None, request: str) -> None:
        """Log that a key was refused, with one line a second at most."""
        now = time.monotonic()
        if now - self._logged_at < _LOG_SECONDS:
            self._unlogged += 1
            return
        more = f", and {self._unlogged} more since the last such line" if self._unlogged else ""
        logger.warning("refused %s of %s (%s)%s", what, client or "an unknown address", request, more)
        self._logged_at, self._unlogged = now, 0

    async def close(self) -> None:
        """Write what is not written yet."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._flush()

    async def _flush_later(self) -> None:
        await asyncio.sleep(_FLUSH_SECONDS)
        self._flushing = None
        await self._flush()

    async def _flush(self) -> None:
        uses, self._uses = self._uses, {}
        if self._store is None or not uses:
            return
        try:
            await asyncio.to_thread(self._store.note_uses, uses)
            self._failed = False
        except PolicyError as error:
            if not self._failed:
                logger.warning("when keys were last used is not noted: %s", error)
            self._failed = True
