"""A request as the handler and the engines see it, and the error that refuses one."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OutputError, PolicyError
from .engine.base import Busy, FormatError, GenerationError, PromptError, Unavailable
from .policy.policy import Key, NotAllowed, Policy

logger = logging.getLogger(__name__)
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class ApiError(Exception):
    """An error response in OpenAI's format, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None, adapter: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        if status == 503:  # each of its causes may be mended by then
            self.headers.setdefault("Retry-After", "5")
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        if adapter is not None:
            self.body["error"]["adapter"] = adapter


def new_id() -> str:
    """Return an id for a request."""
    return f"req-{uuid.uuid4().hex}"


def as_api_error(error: Exception) -> ApiError:
    """Return what a client may know of an error; paths and digests in its message go to the log alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FormatError):
        return ApiError(400, str(error), code="invalid_response_format", param="response_format")
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, asyncio.TimeoutError):
        return ApiError(504, "the request took too long", code="timeout")
    if isinstance(error, GenerationError):
        logger.error("an answer could not be finished: %s", error)
        return ApiError(500, str(error), code="generation_failed")
    if isinstance(error, Unavailable):
        logger.error("refused, adapter '%s': %s", error.adapter, error)
        name = f"the adapter '{error.adapter}'" if error.adapter else "something that must be forgotten"
        message = f"{name} cannot be applied now, so this request is refused"
        return ApiError(503, message, code="adapter_unavailable", adapter=error.adapter)
    if isinstance(error, NotAllowed):
        return ApiError(403, str(error), code="adapter_not_allowed", param="forget")
    if isinstance(error, PolicyError):
        logger.error("refused: %s", error)
        return ApiError(503, "the policy cannot be applied now, so this request is refused", code="policy_unavailable")
    if isinstance(error, OutputError):
        return ApiError(503, "the audit log cannot be written, so this request is refused", code="audit_unavailable")
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "an unexpected error; see the server's log", code="internal_error")


@dataclass(frozen=True)
class ParsedRequest:
    """The body of a request in the engine's terms."""

    model: str
    chat: bool
    prompts: tuple[Prompt, ...]
    n: int  # answers to each prompt
    max_tokens: int | None  # None: as many as fit
    settings: Mapping[str, Any]  # fields of `Generation`
    stream: bool
    include_usage: bool
    forget: Mapping[str, float]
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    schema: str | None = None  # JSON text: the answers are JSON that follows it
    called: Any = None  # the `CalledTools` one of which the answers call
    cache_salt: str | None = None  # shares what prompts begin with among requests of its tenant with the same one alone


@dataclass
class Call:
    """One request while it is served, and what is recorded of it."""

    tenant: str
    policy: Policy
    key: Key | None = None  # None: without keys
    client: str | None = None  # the address that it came from
    id: str = field(default_factory=new_id)
    began: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    forget: Mapping[str, float] = field(default_factory=dict)  # adapter -> strength: of the policy and the request
    set_digest: str = ""
    applied: list[Mapping[str, Any]] | None = None  # None: refused before it had a lease
    leaks: Sequence[str] = ()  # adapters whose probes leak in this set, see `Canary`
    prompt_tokens: int = 0
    completion_tokens: int = 0  # that were sent
    generated: int = 0  # tokens, sent or not
    claimed: int = 0  # its answers under way, see `RequestHandler.enter`
    unfinished: int = 0  # of these, what is not wholly generated
    placed: float | None = None  # when the first of its answers had a place, of `time.monotonic`
    first: float | None = None  # when the first of its text came
    span: Any = None  # of `Tracing`, while it runs
    base_only: bool = False  # asks for the base alone; only where `RequestHandler.shows_base`

    @property
    def key_id(self) -> str | None:
        """What logs call its key: the first digits of the sha256."""
        return None if self.key is None else self.key.id

    def require(self, *wanted: str) -> None:
        """Check that the key has these scopes; see `KeyEntry`.

        Raises:
            ApiError: 403 if it does not.
        """
        scopes = None if self.key is None else self.key.entry.scopes
        if scopes is not None and (lacking := set(wanted) - set(scopes)):
            message = f"this API key does not allow '{min(lacking)}': ask the operator for one that does"
            raise ApiError(403, message, code="key_scope")

    def record(self) -> dict[str, Any]:
        """Return what each line of the audit log has."""
        return {
            "id": self.id, "tenant": self.tenant, "key": self.key_id, "client": self.client,
            "policy": self.policy.version, "set": self.set_digest, "adapters": self.applied,
            **({"playground_base": True} if self.base_only else {}), **({"leaks": self.leaks} if self.leaks else {}),
        }  # fmt: skip

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, as OpenAI counts them."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total
        }  # fmt: skip
