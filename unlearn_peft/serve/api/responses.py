"""Pieces of answers -> bodies and stream events in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.base import Candidate, TokenLogprobs


@dataclass
class Answer:
    """One choice while its pieces come in."""

    index: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class ResponseFormat:
    """The parts that all bodies and events of one response share."""

    chat: bool
    id: str
    model: str
    created: int  # seconds since 1970
    fingerprint: str  # of the base and exactly what was forgotten
    logprobs: bool

    def body(self, answers: Sequence[Answer], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the whole response."""
        choices = [
            {
                "index": answer.index,
                **({"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}),
                "logprobs": self._logprobs(answer.logprobs, 0),
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ]
        return self._envelope("chat.completion" if self.chat else "text_completion", choices, usage)

    def role(self, index: int) -> dict[str, Any]:
        """Return a chat stream's first event for a choice."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._envelope("chat.completion.chunk", [choice])

    def event(
        self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str | None, before: int
    ) -> dict[str, Any]:
        """Return the event for a piece; `before` is how many characters of text came before it."""
        said: dict[str, Any] = (
            {"delta": {"content": text} if text or not reason else {}} if self.chat else {"text": text}
        )
        choice = {"index": index, **said, "logprobs": self._logprobs(logprobs, before), "finish_reason": reason}
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage_event(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return a stream's last event, if usage was asked for."""
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion", [], usage)

    def _envelope(
        self, kind: str, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        body = {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": list(choices),
        }  # fmt: skip
        return body if usage is None else {**body, "usage": dict(usage)}

    def _logprobs(self, entries: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = [{**_token(e.chosen), "top_logprobs": [_token(c) for c in e.top]} for e in entries]
            return {"content": content, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.chosen.text)
        return {
            "tokens": [e.chosen.text for e in entries],
            "token_logprobs": [e.chosen.logprob for e in entries],
            "top_logprobs": [{c.text: c.logprob for c in e.top} for e in entries],
            "text_offset": offsets,
        }


def _token(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.text, "logprob": candidate.logprob, "bytes": list(candidate.data)}
