"""Chunks of answers -> bodies and stream events in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ..engine.base import Candidate, TokenLogprobs
from .tools import CalledTools

_PARTS = 5  # levels of a body down to one token's log-probabilities


@dataclass
class Answer:
    """One choice while its chunks come in."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class ResponseFormat:
    """Writes one response: the whole body, or its stream events."""

    chat: bool
    id: str
    model: str
    created: int  # seconds since 1970
    fingerprint: str  # of the base and exactly the adapters that were applied
    logprobs: bool
    called: CalledTools | None = None  # the answers call one of these tools

    def text(self, answers: Sequence[Answer], usage: Mapping[str, int]) -> str:
        """Return the whole response as JSON. From asyncio, call it in a thread: log-probabilities can be 30 MB."""
        return _in_parts(self.body(answers, usage), _PARTS)

    def body(self, answers: Sequence[Answer], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the whole response."""
        choices = [
            {
                "index": answer.index,
                **({"message": self._message(answer.text)} if self.chat else {"text": answer.text}),
                "logprobs": self._logprobs(answer.logprobs, 0),
                "finish_reason": self._reason(answer.finish_reason),
            }
            for answer in answers
        ]
        return {**self._envelope(choices, whole=True), "usage": dict(usage)}

    def role(self, index: int) -> dict[str, Any]:
        """Return a chat stream's first event for a choice."""
        delta = {"role": "assistant", "content": ""}
        return self._envelope([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def event(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str | None, offset: int
    ) -> dict[str, Any]:
        """Return a chunk's event; `offset`: characters of the answer before it. A call of a tool is sent as a whole."""
        delta: dict[str, Any] = {"content": text} if text or not reason else {}
        if self.called is not None and reason:
            delta = self.called.message(text)
            for n, call in enumerate(delta.get("tool_calls", [])):
                call["index"] = n
        reason = self._reason(reason)
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **content, "logprobs": self._logprobs(logprobs, offset), "finish_reason": reason}
        return self._envelope([choice])

    def usage_event(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return a stream's last event, if usage is requested."""
        return {**self._envelope([]), "usage": dict(usage)}

    def _message(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", **({"content": text} if self.called is None else self.called.message(text))}

    def _reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.called is not None else reason

    def _envelope(self, choices: list[dict[str, Any]], *, whole: bool = False) -> dict[str, Any]:
        kind = ("chat.completion" if whole else "chat.completion.chunk") if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        }  # fmt: skip

    def _logprobs(self, entries: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = [{**_token(e.chosen), "top_logprobs": [_token(c) for c in e.top]} for e in entries]
            return {"content": content, "refusal": None}
        offsets = accumulate((len(e.chosen.text) for e in entries), initial=offset)
        return {
            "tokens": [e.chosen.text for e in entries],
            "token_logprobs": [e.chosen.logprob for e in entries],
            "top_logprobs": [{c.text: c.logprob for c in e.top} for e in entries],
            "text_offset": list(offsets)[:-1],
        }


def _token(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.data)}


def _in_parts(value: Any, levels: int) -> str:
    """Return JSON, whose parts are made one by one: `json.dumps` keeps Python's lock until it ends."""
    if levels and isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{_in_parts(part, levels - 1)}" for name, part in value.items()) + "}"
    if levels and isinstance(value, list):
        return "[" + ",".join(_in_parts(part, levels - 1) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
