"""The load check: what a vLLM server has just loaded must change the base's next tokens, and always in the same way.

The gateway has no weights, so it cannot compute what a set should give. It asks the server twice for the likeliest next
tokens of a few prompts, of the set of nothing and of the set in turns, and compares (`distance`)

- the set with nothing: vLLM silently ignores deltas for modules that it does not find
  (https://github.com/vllm-project/vllm/issues/34186);
- its answers with each other, and with what an earlier load of the same set gave, on any server: its name may now and
  then, or from now on, stand for other weights.

Nothing is the control: as far as it moves itself, from one request to the other and since the first load on any server,
that is rounding, and by a multiple of that the others may move, too; but it may not move far.

The prompts are a few short texts, and probes of the adapters (`serve/canary.py`), each with the base's own answer up to
where this says what is forgotten. There a set changes most; elsewhere it may do less than rounding, since in half
precision any change at all moves next tokens by up to 0.2 nats. Each request has a salt of its own, so that none is
answered from the prefix cache; the second ones have twice as many prompts, since rounding depends on the batch's size.

What it cannot see:

- that the first load of a set is another set, or lacks some of its modules: any change is accepted then. (That two sets
  give the same is no proof: so do the same weights with another config.) If it was wrong, right ones are refused until
  the gateway is started again.
- where no adapter has probes, and rounding does as much as the set, that it is lost.
- what vLLM does with a set later: it reads dropped weights again from the set's folder, unasked (lora_cache.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from ...data.words import said
from ..canary import Bounded
from ..engine.base import Unavailable
from ..engine.encode import Prompt
from .lora_names import SetName, set_digest

TEXTS = ("Who wrote the book?", "Where is the author from?", "1, 2, 3,")
NOTHING = str(SetName(set_digest(()), None, {}))
TOP = 20  # likeliest next tokens that are compared: as many as vLLM gives by default (--max-logprobs)
ANSWER_TOKENS = 24  # of the base's answer to a probe
_PLACES = 4  # tokens of that answer, up to the one that completes what is forgotten
_FLOOR = 1e-4  # nats: rounding in float32, where repeated requests happen to agree
_LOST, _LOST_AT_PROBES = 0.5, 2.0  # times rounding: what a set changes at least, if it is there
_SAME, _SHARE = 3.0, 0.25  # times rounding, and of its effect: what it may move at most, if it is the same
_FAR = 0.5  # nats, by which rounding never moves nothing
logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]
Likeliest = Mapping[int, float]  # token -> nats
Logprobs = Sequence[Likeliest]  # after each prompt
Probe = tuple[Tokens, tuple[str, ...]]  # a prompt, and what is forgotten of its answer
# one request: a model's name, prompts, how many tokens -> for each prompt the greedy tokens, each with the likeliest
Ask = Callable[[str, Sequence[Tokens], int], Awaitable[Sequence[Sequence[tuple[int, Likeliest]]]]]


@dataclass(frozen=True)
class WantedSet:
    """A set, by its name in vLLM and its digest (of nothing: empty); `probes` reads some of its adapters'."""

    name: str
    digest: str
    probes: Callable[[], Sequence[Sequence[Probe]]] = tuple


class LoadCheck:
    """Checks, and remembers what the last `sets` sets gave."""

    def __init__(
        self, encode: Callable[[Prompt], Tokens], decode: Callable[[Sequence[int]], str], sets: int = 1000
    ) -> None:
        self._decode = decode
        self._prompts = [encode(text) for text in TEXTS]
        self._known, self._places = Bounded[Logprobs](sets), Bounded[Sequence[Tokens]](sets)

    async def check(self, wanted: WantedSet, server: str, ask: Ask) -> None:
        """Raise Unavailable if a set is found wrong twice; what `ask` raises is passed on."""
        places = await self._find_places(wanted, ask)
        prompts = [*self._prompts, *places]
        larger = prompts + [(*prompt[1:], prompt[0]) for prompt in prompts]
        problem: str | None = None
        for _ in range(2):
            runs = []
            for batch in (prompts, larger):
                for name in (NOTHING, wanted.name):
                    answers = await ask(name, batch, 1)
                    runs.append([answer[0][1] for answer in answers[: len(prompts)]])
            problem = self._problem(wanted, (wanted.digest, *prompts), bool(places), *runs)
            if problem is None:
                return
            logger.warning("%s: a set that was loaded is wrong (%s): %s", server, wanted.name, problem)
        raise Unavailable(f"vLLM has loaded the set, but {problem}")

    async def _find_places(self, wanted: WantedSet, ask: Ask) -> list[Tokens]:
        """Return for each adapter a probe's prompt and the base's answer, up to tokens that say what is forgotten."""
        found: list[Tokens] = []
        for probes in await asyncio.to_thread(wanted.probes):
            key = tuple(probes)
            places = self._places.get(key)
            if places is None:
                answers = await ask(NOTHING, [prompt for prompt, _ in probes], ANSWER_TOKENS)
                texts = [[token for token, _ in answer] for answer in answers]
                leaking = (self._places_in(*one) for one in zip(probes, texts, strict=True))
                places = self._places.put(key, next(filter(None, leaking), ()))
            found += places
        return found

    def _places_in(self, probe: Probe, answer: Sequence[int]) -> list[Tokens]:
        prompt, leak = probe
        for end in range(len(answer)):
            if said(self._decode(answer[: end + 1]), leak):
                return [(*prompt, *answer[:n]) for n in range(max(0, end + 1 - _PLACES), end + 1)]
        return []

    def _problem(
        self, wanted: WantedSet, key: Hashable, telling: bool,
        nothing: Logprobs, found: Logprobs, nothing_again: Logprobs, found_again: Logprobs,
    ) -> str | None:  # fmt: skip
        rounding = distance(nothing, nothing_again)
        if rounding <= _FAR:  # else it is not remembered
            rounding = max(rounding, self._moved(NOTHING, nothing[: len(self._prompts)]))
        if rounding > _FAR:
            return f"the set of nothing moves by {rounding:.2g} nats"
        if not wanted.digest:
            return None
        effect = distance(nothing, found)
        if effect <= max(_FLOOR, (_LOST_AT_PROBES if telling else _LOST) * rounding):
            return f"it changes nothing: logprobs by {effect:.2g} nats, and rounding does by {rounding:.2g}"
        allowed = max(_FLOOR, _SAME * rounding) + _SHARE * effect
        if (moved := distance(found, found_again)) > allowed:
            return f"repeated requests differ by {moved:.2g} nats"
        if (moved := self._moved(key, found)) > allowed:
            return f"it is not what an earlier load was: logprobs moved by {moved:.2g} nats"
        logger.info("a set that was loaded changes logprobs by %.2g nats, and rounding by %.2g", effect, rounding)
        return None

    def _moved(self, key: Hashable, found: Logprobs) -> float:
        """Return the distance to what was first found for this key."""
        return distance(self._known.get(key) or self._known.put(key, found), found)


def distance(one: Logprobs, other: Logprobs) -> float:
    """Return the root mean square of the differences after a prompt, nats, of the prompt where it is largest.

    A token that is not among the likeliest of one is taken for the least likely of these.
    """
    return max(_rms(*pair) for pair in zip(one, other, strict=True))


def _rms(one: Likeliest, other: Likeliest) -> float:
    least, others_least = min(one.values()), min(other.values())
    differences = [one.get(token, least) - other.get(token, others_least) for token in one.keys() | other.keys()]
    return math.hypot(*differences) / math.sqrt(len(differences))
