"""What is recorded of a request: lines of the audit log, metrics, its span."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from ..errors import OutputError
from .audit import AuditLog
from .metrics import Metrics
from .request import ApiError, Call
from .tracing import Tracing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorder:
    """Records calls. `audit` and `tracing` are None where there is none."""

    audit: AuditLog | None
    metrics: Metrics
    tracing: Tracing | None

    @property
    def keeps_text(self) -> bool:
        """Whether prompts and answers are recorded, too."""
        return self.audit is not None and self.audit.prompts

    async def finish(self, call: Call, status: int, code: str | None = None, answers: list[str] | None = None) -> None:
        """Record and count a request's end. If that cannot be written, only an answer that is not whole yet fails."""
        try:
            await self.write(
                "finished", call, status=status, code=code, prompt_tokens=call.prompt_tokens,
                completion_tokens=call.completion_tokens,
                **({"answers": answers} if self.keeps_text and answers else {}),
            )  # fmt: skip
        except OutputError:
            if status == 200:
                raise
        if self.tracing is not None:
            self.tracing.finish(call, status, code)
        self.metrics.requests.labels(call.tenant, str(status)).inc()
        self.metrics.seconds.observe(time.monotonic() - call.began)
        for kind, count in (("prompt", call.prompt_tokens), ("completion", call.completion_tokens)):
            self.metrics.tokens.labels(call.tenant, kind).inc(count)

    async def write(self, event: str, call: Call, **fields: Any) -> None:
        """Write a line of the audit log about a call.

        Raises:
            OutputError: it cannot be written, and must be.
        """
        if self.audit is None:
            return
        line = {**call.record(), **fields}
        try:
            if self.audit.fsync:
                await asyncio.to_thread(self.audit.write, event, **line)
            else:
                self.audit.write(event, **line)
        except OutputError as error:
            logger.error("%s", error)
            if self.audit.required:
                raise

    def refused(self, error: ApiError) -> ApiError:
        """Count a refusal, and return it."""
        self.metrics.refusals.labels(error.code or "none").inc()
        return error
