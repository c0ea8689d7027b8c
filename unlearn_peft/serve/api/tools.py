"""OpenAI's `tools`: the chat template shows them, and an answer that must call one is JSON of its parameters' schema.

Each family writes a call in its own way, and says nowhere how. So a call is never looked for in free text: it is asked
for (`tool_choice`: "required" or a name), and then the answer can be nothing else.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from ..request import ApiError

MAX_TOOLS = 64
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class _Function(BaseModel, extra="forbid"):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None  # without effect: a schema is always kept


class Tool(BaseModel, extra="forbid"):
    """One function that a model may call."""

    type: Literal["function"]
    function: _Function


class _FunctionName(BaseModel, extra="forbid"):
    name: _Name


class NamedTool(BaseModel, extra="forbid"):
    """The function that a model must call."""

    type: Literal["function"]
    function: _FunctionName


class _Call(BaseModel, extra="forbid"):
    name: _Name
    arguments: str  # JSON of an object

    @field_validator("arguments")
    @classmethod
    def _object(cls, text: str) -> str:
        try:
            if isinstance(json.loads(text), dict):
                return text
        except (ValueError, RecursionError):
            pass
        raise ValueError("expected the JSON of an object")


class ToolCall(BaseModel, extra="forbid"):
    """A call that an earlier answer made, as clients send it back."""

    id: Annotated[str, Field(max_length=64)]
    type: Literal["function"] = "function"
    function: _Call

    def plain(self) -> dict[str, Any]:
        """Return it as chat templates take it."""
        arguments = json.loads(self.function.arguments)
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


@dataclass(frozen=True)
class CalledTools:
    """The functions one of which an answer calls: of one, it is the arguments; of several, its name and them."""

    tools: tuple[Tool, ...]

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the answer."""
        if len(self.tools) == 1:
            return self.tools[0].function.parameters
        return {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool.function.name},
                        "arguments": _moved(tool.function.parameters, f"#/anyOf/{n}/properties/arguments"),
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for n, tool in enumerate(self.tools)
            ]
        }

    def message(self, text: str) -> dict[str, Any]:
        """Return an answer as fields of a message; of one that was cut before its arguments, its text."""
        name, arguments = self.tools[0].function.name, text
        if len(self.tools) > 1:
            try:
                call = json.loads(text)
            except ValueError:
                return {"content": text}
            name, arguments = call["name"], json.dumps(call["arguments"], ensure_ascii=False)
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        return {"content": None, "tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}


def called_tools(tools: Sequence[Tool], choice: str | NamedTool | None) -> CalledTools | None:
    """Return the functions one of which must be called; None: none is, and the template shows them all the same.

    Raises:
        ApiError: the choice names no tool, or leaves it to the model.
    """
    if not tools or choice == "none":
        if choice in (None, "none", "auto"):
            return None
        raise _refusal("there are no tools to choose from: send tools, too")
    if choice in (None, "auto"):
        raise _refusal(
            "this server does not find calls in free text: set tool_choice to 'required', to {'type': 'function', "
            "'function': {'name': ...}}, or to 'none'",
            code="unsupported_parameter",
        )
    named = tuple(tool for tool in tools if choice == "required" or tool.function.name == choice.function.name)  # type: ignore[union-attr]
    if not named:
        raise _refusal("it names none of the tools")
    return CalledTools(named)


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself hold where it is a part of another, at `place`."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def _refusal(message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"tool_choice: {message}", param="tool_choice", code=code)
