"""Bodies as OpenAI's clients send them -> `ParsedRequest`.

Parameters without effect on the answer are ignored; those that this server cannot honour (tools, images, ...) are
refused, and so are unknown ones.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ...errors import safe_repr
from ..request import ApiError, ParsedRequest, Prompt
from .json_schema import bounded_schema
from .tools import MAX_TOOLS, NamedTool, Tool, ToolCall, called_tools

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 256
# beyond what any model takes: so that a body is refused before something is built of each of its parts
_MAX_FIELDS, _MAX_FORGET, _MAX_MESSAGES, _MAX_PROMPTS, _MAX_IDS = 64, 256, 4096, 1024, 1 << 20
_MAX_NAME = 64  # characters of a name that an error repeats
# about the caller, or for features of the service that do not change the answer
_IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
}  # fmt: skip
# fields -> their values without effect
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "logit_bias": ({},), "modalities": (["text"],), "best_of": (1,),
    "echo": (False,), "suffix": ("",),
}  # fmt: skip


class _Text(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: str


class _Message(BaseModel, extra="forbid"):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[_Text], Field(fail_fast=True, max_length=_MAX_MESSAGES)] = ""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] = []  # of an assistant
    tool_call_id: Annotated[str, Field(max_length=64)] | None = None  # of a tool

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, values: Any) -> Any:
        """Leave out what clients send back with an answer of this server: `refusal: null`, `tool_calls: []`."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None and value != []}

    @model_validator(mode="after")
    def _of_its_role(self) -> _Message:
        if bool(self.tool_calls) > (self.role == "assistant") or (self.tool_call_id is not None) != (
            self.role == "tool"
        ):
            raise ValueError("tool_calls are of the role assistant, tool_call_id of the role tool, and of no other")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: Field required")
        return self

    def plain(self) -> dict[str, Any]:
        """Return role and text, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message |= {"tool_call_id": self.tool_call_id, **({"name": self.name} if self.name else {})}
        return message


class _StreamOptions(BaseModel, extra="forbid"):
    include_usage: bool = False
    include_obfuscation: bool = False  # without effect: there is none


class _JsonSchema(BaseModel, extra="forbid"):
    name: str | None = None  # for the client's own use, like the next two: a schema is always kept
    description: str | None = None
    strict: bool | None = None
    values: dict[str, Any] = Field(alias="schema")


class _Format(BaseModel, extra="forbid"):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> _Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema: {schema: ...} with the type json_schema, and with no other")
        return self

    def schema_text(self) -> str | None:
        """Return the JSON schema of the answers; None: any text."""
        if self.type == "text":
            return None
        return bounded_schema({"type": "object"} if self.json_schema is None else self.json_schema.values)


class _Common(BaseModel, extra="allow"):
    model: str
    n: int = Field(1, ge=1, le=10_000)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)  # an extension, as vLLM has it; 0 and -1: all
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]],
        Field(fail_fast=True, max_length=_MAX_STOPS),
    ] = []
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    ignore_eos: bool = False  # an extension, as vLLM has it
    cache_salt: str | None = Field(None, min_length=1, max_length=256)  # likewise
    response_format: _Format | None = None
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
        if isinstance(value, (list, dict)) and len(value) > _MAX_FORGET:
            raise ValueError(f"{len(value)} adapters: at most {_MAX_FORGET}")
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return dict.fromkeys(value, 1.0)
        return value


class ChatRequest(_Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(fail_fast=True, min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] = {}  # an extension, as vLLM has it: variables of the template

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not _rendering().isdisjoint(values):
            raise ValueError("only variables of the chat template, such as enable_thinking, can be set here")
        return values


_Ids = Annotated[
    list[Annotated[int, Field(ge=-(2**63), lt=2**63)]], Field(fail_fast=True, min_length=1, max_length=_MAX_IDS)
]
_Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=_MAX_PROMPTS)]
_ManyIds = Annotated[list[_Ids], Field(fail_fast=True, min_length=1, max_length=_MAX_PROMPTS)]


class CompletionRequest(_Common):
    """The body of /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)] | _Ids | _Texts | _ManyIds
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)


BODIES: dict[str, type[BaseModel]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}


def read_request(body: bytes, *, chat: bool) -> ParsedRequest:
    """Read a request's body.

    Raises:
        ApiError: naming what is wrong; it never quotes texts of the request.
    """
    kind: type[ChatRequest] | type[CompletionRequest] = ChatRequest if chat else CompletionRequest
    try:
        request = kind.model_validate(_without_nulls(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where, message = ".".join(_short(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        if first["loc"][0] == "prompt" and len(first["loc"]) > 1:  # pydantic says what each of the kinds would need
            where, message = (
                "prompt",
                f"expected a text, or a list of texts or token ids; {_MAX_PROMPTS} prompts at most",
            )
        if first["type"] == "extra_forbidden":
            raise _unsupported(where) from None
        raise ApiError(400, f"{where}: {message}", param=where, code="invalid_value") from None
    for name, value in (request.model_extra or {}).items():
        if name not in _IGNORED and value not in _NEUTRAL.get(name, ()):
            raise _unsupported(_short(name))
    prompts: tuple[Prompt, ...]
    variables: dict[str, Any] = {}
    called, schema = None, None if request.response_format is None else request.response_format.schema_text()
    if isinstance(request, ChatRequest):
        prompts = (tuple(message.plain() for message in request.messages),)
        max_tokens, variables = request.max_completion_tokens or request.max_tokens, request.chat_template_kwargs
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        called = called_tools(request.tools, request.tool_choice)
        if request.tools:
            variables = {**variables, "tools": [tool.model_dump(exclude_none=True) for tool in request.tools]}
        if called is not None:
            if schema is not None:
                message = "an answer cannot call a tool and have a response_format: leave one of them out"
                raise ApiError(400, message, param="response_format", code="invalid_value")
            schema = bounded_schema(called.schema())
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
        variables, schema, called, request.cache_salt,
    )  # fmt: skip


def _without_nulls(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if len(values) > _MAX_FIELDS:
        raise ApiError(400, f"the body has {len(values)} parameters: at most {_MAX_FIELDS}", code="invalid_value")
    for name, value in values.items():  # "\\ud83d" alone is JSON, and no text that any model or log could hold
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except RecursionError:
            raise ApiError(400, "the body is not JSON", code="invalid_json") from None
        except UnicodeEncodeError:
            param = _short(name) if name.isascii() else None
            raise ApiError(
                400, "a text holds half of a character, a lone surrogate", param=param, code="invalid_value"
            ) from None
    return {name: value for name, value in values.items() if value is not None}


def _unsupported(where: str) -> ApiError:
    message = f"this server does not support this value of '{where}': leave it out"
    return ApiError(400, message, param=where, code="unsupported_parameter")


def _short(name: object) -> str:
    """Return a name that a client gave, as an error may repeat it."""
    text = str(name)
    return text if len(text) <= _MAX_NAME and text.isprintable() else safe_repr(text[:_MAX_NAME]) + "..."


@lru_cache(maxsize=1)
def _rendering() -> frozenset[str]:
    """Return what transformers' own rendering takes, and templates get from it: not for a client to set."""
    from transformers import PreTrainedTokenizerBase

    return frozenset({"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters})
