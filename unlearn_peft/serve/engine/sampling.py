"""One row's logits -> its next token, by the row's own settings and its own random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ...inference.decoding import GREEDY_BELOW
from .base import Candidate, Generation, TokenLogprobs


class Sampler:
    """Chooses one row's tokens. Its random numbers depend on its seed alone, not on the rows beside it."""

    def __init__(self, request: Generation) -> None:
        self.greedy = request.temperature < GREEDY_BELOW
        self._presence, self._frequency = request.presence_penalty, request.frequency_penalty
        self._counts = Counter[int]()  # of the answer's tokens
        self._top = request.logprobs
        self._constraint = request.grammar.start() if request.grammar is not None else None
        self.finished = False  # nothing may follow
        self.plain = self.greedy and not (self._presence or self._frequency or request.grammar) and self._top is None
        self._warpers: list[Callable[[None, Tensor], Tensor]] = []
        if self.greedy:
            return
        self._random = torch.Generator()
        if request.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(request.seed)
        if request.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(request.temperature)))
        if request.top_k:
            self._warpers.append(TopKLogitsWarper(request.top_k))
        if request.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(request.top_p)))

    def choose(self, logits: Tensor, data: Callable[[int], bytes]) -> tuple[int, TokenLogprobs | None]:
        """Return the next token and, if asked for, its log-probability and those of the likeliest (nats).

        `logits` (V,) are on the CPU in float32; `data` gives the bytes of a token.

        Raises:
            FormatError: the answer cannot follow its response format any further.
        """
        scores = logits.clone() if self._counts else logits
        if self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[list(self._counts)] -= self._presence + counts * self._frequency
        if self._constraint is not None:
            allowed = self._constraint.allowed(len(logits))
            scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~allowed, -torch.inf)
        if self.greedy:
            token = int(scores.argmax())
        else:
            row = scores[None]
            for warp in self._warpers:
                row = warp(None, row)
            token = int(torch.multinomial(row.softmax(-1)[0], 1, generator=self._random))
        if self._constraint is not None:
            self.finished = self._constraint.push(token)
        if self._presence or self._frequency:
            self._counts[token] += 1
        if self._top is None:
            return token, None
        values = logits.log_softmax(-1)
        likeliest = values.topk(min(self._top, len(values))).indices.tolist()
        chosen, *top = (Candidate(place, data(place), float(values[place])) for place in [token, *likeliest])
        return token, TokenLogprobs(chosen, tuple(top))
