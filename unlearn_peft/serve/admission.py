"""How many answers are under way, and whether a further request has room: looked at before anything is built for it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from .limits import BYTES_PER_TOKEN, Limits
from .request import ApiError, Call, Prompt

_RECENT = 5.0  # seconds for which a tenant counts as there, so that who asks again and again is never taken for gone


class Places:
    """Counts answers under way, by tenant. They are `active` until they are generated, and the tenant's until sent."""

    def __init__(self, limits: Limits, *, only_tenant: bool = False) -> None:
        self._limits, self._only_tenant = limits, only_tenant
        self.active = 0  # answers that run or wait
        self._under_way = Counter[str]()  # by tenant: these, and those that are not wholly sent
        self._left = OrderedDict[str, float]()  # tenants that had the last of these, and when; the oldest first
        self._mean_seconds = 1.0  # moving average of an answered request's duration

    def claim(self, call: Call, count: int) -> None:
        """Let a request have `count` answers under way; if it is refused, it keeps those that it had.

        Raises:
            ApiError: 429 if the server has no room, or the tenant's share is used up.
        """
        limits, more = self._limits, count - call.claimed
        full = self.active + more > limits.room
        share = limits.room if self._only_tenant and limits.per_tenant is None else limits.share
        if full or self._under_way[call.tenant] + more > share:
            wait = math.ceil(self._mean_seconds * max(1.0, self.active / limits.batch))
            message = "the queue is full" if full else f"too many requests of yours are under way: at most {share}"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(min(max(wait, 1), 60))})
        self.active += more
        self._under_way[call.tenant] += more
        call.claimed = call.unfinished = count

    def generated(self, call: Call) -> None:
        """Note that nothing of a request runs or waits any more. A second call does nothing."""
        self.active -= call.unfinished
        call.unfinished = 0

    def leave(self, call: Call) -> None:
        """Note that all is over. A second call does nothing."""
        self.generated(call)
        self._under_way[call.tenant] -= call.claimed
        if not self._under_way[call.tenant]:
            del self._under_way[call.tenant]
            if call.claimed:
                self._left[call.tenant] = time.monotonic()
                self._left.move_to_end(call.tenant)
        call.claimed = 0

    def present(self) -> set[str]:
        """Return the tenants that have an answer under way, or had one a moment ago."""
        while self._left and next(iter(self._left.values())) < time.monotonic() - _RECENT:
            self._left.popitem(last=False)
        return {*self._under_way, *self._left}

    def took(self, seconds: float) -> None:
        """Note how long a request took that was answered."""
        self._mean_seconds += (seconds - self._mean_seconds) / 16


def check_size(prompt: Prompt, variables: Mapping[str, Any], longest: int) -> None:
    """Refuse a prompt that is too long however it is tokenized, before that takes time and memory.

    Raises:
        ApiError: it has more than `longest` ids, or more than `BYTES_PER_TOKEN` bytes for each.
    """
    if is_chat(prompt):
        others = [{name: value for name, value in message.items() if name != "content"} for message in prompt]  # type: ignore
        texts: Sequence[Any] = [*(message["content"] for message in prompt), json.dumps([variables, others])]  # type: ignore
    elif isinstance(prompt, str):
        texts = [prompt]
    else:
        if len(prompt) > longest:
            raise too_long(f"{len(prompt)} tokens: at most {longest}")
        return
    size = sum(len(text.encode()) for text in texts)
    if size > longest * BYTES_PER_TOKEN:
        raise too_long(f"{size} bytes, more than {longest} tokens have: at most {longest * BYTES_PER_TOKEN}")


def answer_tokens(prompt: int, asked: int | None, limits: Limits, context: int) -> int:
    """Return how many tokens an answer may have to a prompt of `prompt` tokens; None is asked for as many as fit.

    Raises:
        ApiError: the prompt or the answer does not fit.
    """
    if prompt > (longest := min(limits.prompt_tokens, context - 1)):
        raise too_long(f"{prompt} tokens: at most {longest}")
    most = min(limits.max_tokens, context - prompt)
    if asked is not None and asked > most:
        message = f"max_tokens is {asked}: at most {most} for this prompt. Ask for fewer, or shorten it"
        raise ApiError(400, message, code="context_length_exceeded", param="max_tokens")
    return most if asked is None else asked


def is_chat(prompt: Prompt) -> bool:
    """Return whether a prompt is messages."""
    return not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], int)


def too_long(what: str) -> ApiError:
    """Return the refusal of a prompt that has `what`."""
    return ApiError(400, f"the prompt has {what}. Shorten it", code="context_length_exceeded")
