"""What one server accepts, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # hosts that a server without keys may listen on and answer to


@dataclass(frozen=True)
class Limits:
    """Limits of one server; a refusal names the limit."""

    batch: int = 8  # answers that are generated at once
    queue: int = 64  # answers that may wait for a place in the batch; further ones are refused (429)
    per_tenant: int | None = None  # answers that one tenant may have running and waiting
    body_bytes: int = 1_000_000
    prompt_tokens: int = 8192
    max_tokens: int = 1024  # of one answer; also the default of a chat
    answers: int = 16  # of one request: its prompts times `n`
    seconds: float = 300.0  # from a request's arrival to the end of its answers
    drain_seconds: float = 30.0  # for running requests to finish after SIGTERM
