"""Requests as OpenAI's clients write them -> `ParsedRequest`, which the engine's terms are made of.

What changes nothing here is accepted and ignored; what would silently give another answer than was asked for (tools,
JSON schemas, ...) is refused, and so is every parameter that is not known.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..request import ApiError, ParsedRequest, Prompt

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256
# they tell the service about the caller, or steer what this server does not have
_CHANGE_NOTHING = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
}  # fmt: skip
# fields -> values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "logit_bias": ({},), "modalities": (["text"],), "best_of": (1,),
    "echo": (False,), "suffix": ("",),
}  # fmt: skip


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream holds beside its text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # an extension, as vLLM has it; 0 and -1: all
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]] = Field([], max_length=_MAX_STOPS)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    ignore_eos: bool = False  # an extension, as vLLM has it
    stream: bool = False
    stream_options: StreamOptions | None = None
    forget: dict[str, Annotated[float, Field(gt=0, le=10)]] = {}  # our extension: what is to be forgotten on top

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("forget", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return dict.fromkeys(value, 1.0)
        return value


class ChatRequest(_Common):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(_Common):
    """The body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)


def read_request(body: bytes, *, chat: bool) -> ParsedRequest:
    """Read a request's body.

    Raises:
        ApiError: naming what cannot be used. Texts of the request are never quoted.
    """
    kind: type[ChatRequest] | type[CompletionRequest] = ChatRequest if chat else CompletionRequest
    try:
        request = kind.model_validate(_without_nulls(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}", param=where, code="invalid_value") from None
    for name, value in (request.model_extra or {}).items():
        if name not in _CHANGE_NOTHING and value not in _NEUTRAL.get(name, ()):
            raise ApiError(
                400,
                f"this server cannot do '{name}' as asked for: leave it out",
                param=name,
                code="unsupported_parameter",
            )
    prompts: tuple[Prompt, ...]
    if isinstance(request, ChatRequest):
        prompts = (tuple(message.plain() for message in request.messages),)
        longest = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    else:
        given = request.prompt
        alone = isinstance(given, str) or isinstance(given[0], int)
        prompts = (given,) if alone else tuple(given)  # type: ignore[assignment,arg-type]
        longest, logprobs = request.max_tokens, request.logprobs
    settings = {
        name: getattr(request, name)
        for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "ignore_eos")
    }
    settings |= {"top_k": max(request.top_k, 0), "stop": tuple(request.stop), "logprobs": logprobs}
    usage = request.stream_options is not None and request.stream_options.include_usage
    return ParsedRequest(
        request.model, chat, prompts, request.n, longest, settings, request.stream, usage, dict(request.forget)
    )


def _without_nulls(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return {name: value for name, value in values.items() if value is not None}
