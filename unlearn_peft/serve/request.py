"""A request as the server works with it, and the error that answers a wrong one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .policy.policy import Policy

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class ApiError(Exception):
    """An answer in OpenAI's error shape, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        if adapter is not None:
            self.body["error"]["adapter"] = adapter


@dataclass(frozen=True)
class ParsedRequest:
    """A request in terms of the engine; `n` answers to each prompt."""

    model: str
    chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int | None  # None: as many as fit
    settings: Mapping[str, Any]  # fields of `Generation`
    stream: bool
    include_usage: bool
    forget: Mapping[str, float]


@dataclass
class Call:
    """One request on its way, and what there is to be recorded of it."""

    tenant: str
    policy: Policy
    id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    began: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    set_digest: str = ""
    applied: list[Mapping[str, Any]] | None = None  # None: refused before anything was held
    prompt_tokens: int = 0
    completion_tokens: int = 0
    bare: bool = False  # the base alone is asked for; only where `RequestHandler.shows_base`

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far, as OpenAI counts them."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total
        }  # fmt: skip
