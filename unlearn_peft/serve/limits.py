"""What one server accepts, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # hosts that a server without keys may listen on and answer to
BYTES_PER_TOKEN = 16  # a text with more for each token that it may have is refused before it is tokenized
OPENING_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """Limits of one server; a refusal names the limit."""

    batch: int = 8  # answers that are generated at once
    queue: int = 64  # answers that may wait for a place in the batch; further ones are refused (429)
    per_tenant: int | None = None  # answers that one tenant may have under way; None: half of `room`
    body_bytes: int = 1_000_000
    prompt_tokens: int = 8192
    max_tokens: int = 1024  # of one answer; also the default of a chat
    answers: int = 16  # of one request: its prompts times `n`
    seconds: float = 300.0  # from a request's arrival until all of its answers are sent
    drain_seconds: float = 30.0  # for running requests to finish after SIGTERM
    connections: int = 1024  # open at once; fewer where the process may open fewer files
    per_address: int | None = None  # of these, from one address, and new ones in `OPENING_SECONDS`; None: 1/4
    header_seconds: float = 10.0  # for a request's head, from the connection or the head's first byte
    body_seconds: float = 60.0  # for a request's body
    idle_seconds: int = 75  # between two requests: longer than clients (httpx: 5) and proxies (60) keep a connection
    stall_seconds: float = 30.0  # during which a client takes nothing of what is sent to it

    quota_requests: str | None = None  # of a tenant whose policy has none, such as 60/minute; see `Quotas`
    quota_tokens: str | None = None

    @property
    def quotas(self) -> dict[str, str]:
        """The two quotas by kind, where there are any."""
        quotas = {"requests": self.quota_requests, "tokens": self.quota_tokens}
        return {kind: quota for kind, quota in quotas.items() if quota is not None}

    @property
    def room(self) -> int:
        """Answers that may run and wait."""
        return self.batch + self.queue

    @property
    def share(self) -> int:
        """Answers that one tenant may have under way: running, waiting, or not sent yet."""
        return max(self.room // 2, 1) if self.per_tenant is None else self.per_tenant

    @property
    def address_share(self) -> int:
        """Connections that one address may open in `OPENING_SECONDS`, after twice as many at once."""
        return max(self.connections // 4, 1) if self.per_address is None else self.per_address
