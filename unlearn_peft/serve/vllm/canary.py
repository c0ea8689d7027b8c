"""The canary: after a vLLM server has loaded a set, the next tokens' logprobs on fixed prompts must be that set's.

The gateway has no weights, so it cannot compute what a set should give. It compares what vLLM gives

- with the set of nothing on the same server: a set that changes nothing there is refused, since vLLM silently ignores
  deltas for modules that it does not find (https://github.com/vllm-project/vllm/issues/34186);
- with what an earlier load of the same digest gave, on any server: a set that is no longer the same, because it is the
  base or another set, is refused.

Several prompts are asked, as texts and as messages, and dozens of tokens compared, since a LoRA on any layer moves all
logits of all prompts, though those far from what it forgets by little. A set that moves none by more than rounding (in
float32 at a strength of 0.001, say) cannot be told from a lost one, and is refused.

What it cannot see:

- in half precision on a busy server, what moves the prompts by less than rounding does, which is measured (the set of
  nothing, in batches of different sizes): a lost set is surely found only while nothing else is in its batch.
- that the first load of a digest is another set, or has lost some of its modules, since any change is accepted then; if
  it was wrong, right ones are refused until the gateway is started again. (That two sets give the same is no proof: so
  do the same weights with another config, and whoever may add an adapter could choose a strength at which the sets of
  others look like theirs.)
- what vLLM does with a set later: it reads dropped weights again from the set's folder, without being asked
  (lora_cache.py).
- answers from the prefix cache: each request has a salt of its own, so that it is computed.
"""

from __future__ import annotations

import math
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..engine.base import PromptError
from ..engine.encode import Prompt

TEXTS = ("Who wrote the book about the main character?", "Where was the author of the novel born?")
_COMPARED_TOKENS = 64  # vLLM takes 128 `logprob_token_ids`
_FLOOR = 1e-4  # nats: rounding in float32, where repeated runs happen to agree
_SAME, _LOST = 2.0, 0.5  # times the difference of repeated runs: the same set gives less, a set that is not lost more
_SHARE = 0.25  # of its own effect that a set may move between two loads

Logprobs = Sequence[Sequence[float]]  # nats: of each prompt, of each token


@dataclass(frozen=True)
class Reference:
    """What the set of nothing gives on a server, and how far repeated runs differ by rounding (see `distance`)."""

    logprobs: Logprobs
    rounding: float

    @classmethod
    def of_runs(cls, run: Logprobs, other: Logprobs) -> Reference:
        """Make it of two runs in batches of different sizes, which is where repeated runs differ."""
        return cls(run, distance(run, other))


class Canary:
    """Asks, and remembers what the last `sets` digests gave and by how much that was not the set of nothing's."""

    def __init__(self, encode: Callable[[Prompt], Sequence[int]], sets: int = 4096) -> None:
        self.prompts = [encode(text) for text in TEXTS]
        self.tokens = list(dict.fromkeys(chain(*self.prompts)))[:_COMPARED_TOKENS]
        with suppress(PromptError):  # a base without a template
            self.prompts += [encode([{"role": "user", "content": text}]) for text in TEXTS]
        self._sets = sets
        self._known: OrderedDict[str, tuple[Logprobs, float]] = OrderedDict()

    def request(self, model: str, copies: int = 1) -> dict[str, Any]:
        """Return the body of a request to /v1/completions; `copies` of each prompt make the batch larger."""
        return {
            "model": model, "prompt": self.prompts * copies, "max_tokens": 1, "temperature": 0.0, "logprobs": 1,
            "logprob_token_ids": self.tokens, "return_tokens_as_token_ids": True, "cache_salt": secrets.token_hex(16),
        }  # fmt: skip

    def read(self, answer: Mapping[str, Any]) -> Logprobs:
        """Return the answer's logprobs of the first copy; KeyError, TypeError, IndexError or ValueError without."""
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))[: len(self.prompts)]
        likely = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
        if len(likely) != len(self.prompts):
            raise ValueError("answers are missing")
        return [array("f", [of[f"token_id:{token}"] for token in self.tokens]) for of in likely]

    def problem(self, digest: str, found: Logprobs, reference: Reference) -> str | None:
        """Return what is wrong with a set that gives this, or remember it; the digest of the set of nothing is ''."""
        effect, same = distance(found, reference.logprobs), max(_FLOOR, _SAME * reference.rounding)
        if not digest:
            return f"the set of nothing has changed by {effect:.2g} nats on this server" if effect > same else None
        if effect <= max(_FLOOR, _LOST * reference.rounding):
            return f"it changes nothing: fixed prompts' logprobs by {effect:.2g} nats, which rounding does, too"
        known, before = self._known.setdefault(digest, (found, effect))
        self._known.move_to_end(digest)
        if len(self._known) > self._sets:
            self._known.popitem(last=False)
        if (moved := distance(found, known)) > same + _SHARE * before:
            return f"it is not what an earlier load was: fixed prompts' logprobs moved by {moved:.2g} nats"
        return None


def distance(one: Logprobs, other: Logprobs) -> float:
    """Return the root mean square of a prompt's differences, nats, of the prompt where it is largest."""
    return max(math.dist(*pair) / math.sqrt(len(pair[0])) for pair in zip(one, other, strict=True))
