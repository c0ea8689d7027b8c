"""Bodies as OpenAI's clients send them -> `ParsedRequest`.

Parameters without effect on the answer are ignored; those that this server cannot honour (tools, JSON schemas, ...) are
refused, and so are unknown ones.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from ..request import ApiError, ParsedRequest, Prompt

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256
# about the caller, or for features of the service that do not change the answer
_IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
}  # fmt: skip
# fields -> their values without effect
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "logit_bias": ({},), "modalities": (["text"],), "best_of": (1,),
    "echo": (False,), "suffix": ("",),
}  # fmt: skip


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Common(BaseModel, extra="allow"):
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
    stream_options: _StreamOptions | None = None
    forget: dict[str, Annotated[float, Field(gt=0, le=10)]] = {}  # our extension: adapters beside the policy's

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


class _ChatRequest(_Common):  # /v1/chat/completions
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}  # an extension, as vLLM has it: variables of the template

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not _rendering().isdisjoint(values):
            raise ValueError("only variables of the chat template, such as enable_thinking, can be set here")
        return values


class _CompletionRequest(_Common):  # /v1/completions
    prompt: str | list[int] | list[str] | list[list[int]] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)


def read_request(body: bytes, *, chat: bool) -> ParsedRequest:
    """Read a request's body.

    Raises:
        ApiError: naming what is wrong; it never quotes texts of the request.
    """
    kind: type[_ChatRequest] | type[_CompletionRequest] = _ChatRequest if chat else _CompletionRequest
    try:
        request = kind.model_validate(_without_nulls(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}", param=where, code="invalid_value") from None
    for name, value in (request.model_extra or {}).items():
        if name not in _IGNORED and value not in _NEUTRAL.get(name, ()):
            message = f"this server does not support this value of '{name}': leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    prompts: tuple[Prompt, ...]
    variables: dict[str, Any] = {}
    if isinstance(request, _ChatRequest):
        prompts = (tuple(message.plain() for message in request.messages),)
        max_tokens, variables = request.max_completion_tokens or request.max_tokens, request.chat_template_kwargs
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    else:
        prompt = request.prompt
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        prompts = (prompt,) if single else tuple(prompt)  # type: ignore[assignment,arg-type]
        max_tokens, logprobs = request.max_tokens, request.logprobs
    settings = {
        name: getattr(request, name)
        for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "ignore_eos")
    }
    settings |= {"top_k": max(request.top_k, 0), "stop": tuple(request.stop), "logprobs": logprobs}
    usage = request.stream_options is not None and request.stream_options.include_usage
    return ParsedRequest(
        request.model, chat, prompts, request.n, max_tokens, settings, request.stream, usage, dict(request.forget),
        variables,
    )  # fmt: skip


def _without_nulls(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    for name, value in values.items():  # "\\ud83d" alone is JSON, and no text that any model or log could hold
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except RecursionError:
            raise ApiError(400, "the body is not JSON", code="invalid_json") from None
        except UnicodeEncodeError:
            param = name if name.isascii() else None
            raise ApiError(
                400, "a text holds half of a character, a lone surrogate", param=param, code="invalid_value"
            ) from None
    return {name: value for name, value in values.items() if value is not None}


@lru_cache(maxsize=1)
def _rendering() -> frozenset[str]:
    """Return what transformers' own rendering takes, and templates get from it: not for a client to set."""
    from transformers import PreTrainedTokenizerBase

    return frozenset({"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters})
