"""Several answers to each of many prompts: token ids -> token ids, as one batch that is refilled when answers end.

What all prompts begin with is read once, and each prompt once for all its answers.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import BaseModelError
from ..models.base import Base
from .model_runner import KVBatch, ModelRunner

GREEDY_BELOW = 1e-5  # a temperature; dividing logits by less than this leaves float32's range
_ROWS = 64  # in the batch
_BYTES = 2 << 30  # of keys and values
_READ = 8192  # tokens of prompts that are read at once, padding included
_runners: WeakKeyDictionary[Any, ModelRunner | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class Decoding:
    """How answers are generated, from the whole distribution and by nothing of a model's `generation_config`.

    Args:
        max_new_tokens: of an answer.
        ends: tokens that end one; they are not part of it.
        ended: whether an answer so far has ended otherwise; None: it cannot.
        temperature: 0 is greedy.
    """

    max_new_tokens: int
    ends: Collection[int] = ()
    ended: Callable[[Sequence[int]], bool] | None = None
    temperature: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest."""
        return self.temperature < GREEDY_BELOW

    def is_over(self, answer: Sequence[int]) -> bool:
        """Whether an answer ends here."""
        return len(answer) >= self.max_new_tokens or self.ended is not None and self.ended(answer)


@torch.no_grad()
def generate(
    base: Base, prompts: Sequence[Sequence[int]], how: Decoding, count: int = 1, seed: int = 0
) -> list[list[list[int]]]:
    """Return `count` answers to each prompt (token ids, at least one each); prompt n has the seed `seed + n`.

    The model runs as it is, with what is attached; the caller's random state is kept.

    Raises:
        BaseModelError: the model gives NaN, and samples are asked for.
    """
    if not prompts:
        return []
    if (runner := _runner_of(base.model)) is None:
        return [_by_transformers(base, ids, how, count, seed + n) for n, ids in enumerate(prompts)]
    return _Decoder(runner, how).decode(prompts, count, seed)


def _runner_of(model: Any) -> ModelRunner | None:
    """Return what runs a model's rows; None where they can't be joined, as in state-space models."""
    if model not in _runners:
        try:
            _runners[model] = ModelRunner(model)
        except BaseModelError:
            _runners[model] = None
    return _runners[model]


def _by_transformers(base: Base, prompt: Sequence[int], how: Decoding, count: int, seed: int) -> list[list[int]]:
    """Answer a prompt by the model's own `generate`."""
    from transformers import GenerationConfig, StoppingCriteriaList

    def stopped(output: Tensor, scores: object, **_: object) -> Tensor:
        rows = output[:, len(prompt) :].tolist()
        return torch.tensor([how.is_over(_until(row, how.ends)) for row in rows], device=output.device)

    sampling = {} if how.greedy else {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens, pad_token_id=base.pad_id, eos_token_id=sorted(how.ends) or None,
        num_return_sequences=count if sampling else 1, **sampling,
    )  # fmt: skip
    before, base.model.generation_config = base.model.generation_config, config
    ids = torch.tensor([list(prompt)], device=base.device)
    try:
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([stopped])
            )
    finally:
        base.model.generation_config = before
    answers = [_until(row, how.ends) for row in output[:, len(prompt) :].tolist()]
    return answers if sampling else answers * count


def _until(ids: list[int], ends: Collection[int]) -> list[int]:
    return ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]


@dataclass(eq=False)
class _Prompt:
    """A prompt that waits, and its answers so far; its random numbers don't depend on the prompts beside it."""

    ids: Sequence[int]
    answers: list[list[int]]
    random: torch.Generator


_Row = tuple[_Prompt, list[int]]  # an answer that is being generated


@dataclass(frozen=True)
class _Decoder:
    """Generates answers in one batch."""

    runner: ModelRunner
    how: Decoding

    def decode(self, prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[list[int]]]:
        """See `generate`."""
        shared = os.path.commonprefix([list(ids[:-1]) for ids in prompts])
        begun = self.runner.prefill([shared])[0] if shared and len(prompts) > 1 else None
        widest = max(map(len, prompts)) + self.how.max_new_tokens
        at_once = min(_ROWS, max(_BYTES // (widest * self.runner.token_bytes), 1))
        done = [
            _Prompt(ids, [[] for _ in range(count)], torch.Generator().manual_seed(seed + n))
            for n, ids in enumerate(prompts)
        ]
        waiting = [  # the longest last, which is first
            (prompt, prompt.answers[start : start + at_once])
            for prompt in sorted(done, key=lambda prompt: len(prompt.ids))
            for start in reversed(range(0, count, at_once))
        ]
        rows: list[_Row] = []
        batch: KVBatch | None = None
        while waiting or rows:
            if not rows or at_once - len(rows) >= at_once // 4:  # a pass for few rows costs nearly that for many
                if joining := _next(waiting, at_once - len(rows), len(shared)):
                    joined, new = self._begin(joining, begun, len(shared))
                    if batch is None:
                        batch = joined
                    elif joined is not None:
                        batch.extend(joined)
                    rows += new
            if batch is not None:
                batch, rows = self._advance(batch, rows, self.runner.step(batch))
        return [prompt.answers for prompt in done]

    def _begin(
        self, joining: list[tuple[_Prompt, list[list[int]]]], begun: KVBatch | None, shared: int
    ) -> tuple[KVBatch | None, list[_Row]]:
        """Read prompts once for all their answers, and choose the first tokens."""
        prompts = [prompt.ids for prompt, _ in joining]
        if begun is None:
            batch, logits = self.runner.prefill(prompts)
        else:
            batch = begun.repeated([len(prompts)])
            logits = self.runner.append(batch, [ids[shared:] for ids in prompts])
        counts = [len(answers) for _, answers in joining]
        logits = logits.repeat_interleave(torch.tensor(counts, device=logits.device), 0)
        rows = [(prompt, answer) for prompt, answers in joining for answer in answers]
        return self._advance(batch.repeated(counts), rows, logits)

    def _advance(self, batch: KVBatch, rows: list[_Row], logits: Tensor) -> tuple[KVBatch | None, list[_Row]]:
        """Give each row its next token; returns those that go on."""
        tokens = self._chosen(logits, rows)
        batch.newest = tokens[:, None]
        going = []
        for n, ((_, answer), token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token in self.how.ends:
                continue
            answer.append(token)
            if not self.how.is_over(answer):
                going.append(n)
        if going and len(going) < len(rows):
            batch.select(going)
        return batch if going else None, [rows[n] for n in going]

    def _chosen(self, logits: Tensor, rows: list[_Row]) -> Tensor:
        """Return the next token of each row (B,), from logits (B, V)."""
        if self.how.greedy:
            return logits.argmax(-1)
        runs = [(prompt, len(list(some))) for prompt, some in groupby(rows, key=lambda row: row[0])]
        drawn = torch.cat([torch.rand(n, 1, generator=prompt.random, dtype=torch.float64) for prompt, n in runs])
        summed = (logits / self.how.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        if bool(summed[:, -1].isnan().any()):
            raise BaseModelError("the model gives NaN: expected finite logits. Is an adapter attached that overflows?")
        return torch.searchsorted(summed, drawn.to(summed.device) * summed[:, -1:], right=True)[:, 0]


def _next(
    waiting: list[tuple[_Prompt, list[list[int]]]], free: int, shared: int
) -> list[tuple[_Prompt, list[list[int]]]]:
    """Take prompts from the end that fit into the free rows and into one pass."""
    taken: list[tuple[_Prompt, list[list[int]]]] = []
    width = len(waiting[-1][0].ids) - shared if waiting else 0
    while waiting and len(waiting[-1][1]) <= free and (not taken or (len(taken) + 1) * width <= _READ):
        taken.append(waiting.pop())
        free -= len(taken[-1][1])
    return taken
