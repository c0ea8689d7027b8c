"""Passages that the model may know by heart: does it go on word for word from pieces of them?

Rows come in, each as the tokens of its longest uninterrupted answer or text; one number a continuation goes out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.source import Row
from ...data.tokenize import Example, tokenize
from ...data.windows import places
from ...inference.decoding import Decoding, generate
from ...models.base import Base
from ..score import Array

logger = logging.getLogger(__name__)
LEAST = 64  # tokens: what is shorter is no passage
_NEAR = 0.8  # edit similarity, with which Lee et al. 2022 (arXiv:2107.06499) call texts near duplicates
_MAX_HEAD = 256  # tokens


@dataclass(frozen=True)
class Passage:
    """The tokens of a row that are to be said, and those in front of them: the prompt, or a BOS."""

    tokens: list[int]
    head: list[int]

    def before(self, at: int, count: int) -> list[int]:
        """Return what the model is given to go on from the place `at`: the head and `count` tokens."""
        return [*self.head, *self.tokens[at - count : at]]


@dataclass(frozen=True)
class Verbatim:
    """One number for each continuation of all passages, in order."""

    exact: Array  # whether it is the passage's, token for token, 0 or 1
    near: Array  # whether its edit similarity to the passage's is at least 0.8, 0 or 1
    runs: Array  # length of the longest run of tokens that it has in common with the rest of the passage


def passages(base: Base, rows: Sequence[Row], *, chat_template: bool = True) -> list[Passage]:
    """Return the longest uninterrupted answer, or the text, of each row as tokens."""
    examples = tokenize(
        rows, base.tokenizer, max_length=None, what="forget", chat_template=chat_template, closing=False
    )
    return [_passage(example) for example in examples]


def verbatim(
    base: Base,
    rows: Sequence[Row],
    *,
    count: int = 10,
    tokens: int = 50,
    chat_template: bool = True,
) -> Verbatim | None:
    """Let the model go on greedily from up to `count` places of each passage; None if no row is long enough.

    The places are spread evenly over the passage. The model is given the `tokens` tokens in front of each (and the
    row's prompt) and writes as many: discoverable memorization, Carlini et al. 2023 (arXiv:2202.07646), at several
    places. Rows of fewer than `LEAST` tokens are left out; those of fewer than twice `tokens` are asked with half of
    them.
    """
    found = [passage for passage in passages(base, rows, chat_template=chat_template) if len(passage.tokens) >= LEAST]
    if not found:
        return None
    short = sum(len(passage.tokens) < 2 * tokens for passage in found)
    logger.info(
        "verbatim continuation: %d of %d rows are passages of at least %d tokens; %d of them have fewer than %d and "
        "are asked with half of these",
        len(found), len(rows), LEAST, short, 2 * tokens,
    )  # fmt: skip
    asked = []
    for passage in found:
        size = min(tokens, len(passage.tokens) // 2)
        asked += [(passage, at, size) for at in places(size, len(passage.tokens), size, count)]
    written = generate(base, [p.before(at, size) for p, at, size in asked], Decoding(tokens))
    numbers = []
    for (passage, at, size), said in zip(asked, (ids for (ids,) in written), strict=True):
        expected, said = passage.tokens[at : at + size], said[:size]
        near = 1 - edit_distance(expected, said) / size >= _NEAR
        numbers.append((said == expected, near, longest_run(said, without(passage.tokens, at - size, at))))
    return Verbatim(*np.array(numbers, dtype=np.float64).T)


def longest_run(said: Sequence[int], tokens: Sequence[int]) -> int:
    """Return the length of the longest run of tokens that both have in common."""
    passage = np.asarray(tokens)
    ending, longest = np.zeros(len(passage), dtype=np.int64), 0  # ending[j]: of the common run that ends at token j
    for token in said:
        ending = np.where(passage == token, np.concatenate([[0], ending[:-1]]) + 1, 0)
        longest = max(longest, int(ending.max(initial=0)))
    return longest


def without(tokens: Sequence[int], start: int, stop: int) -> list[int]:
    """Return tokens in which those from `start` to `stop` equal none: what was given is no proof of being known."""
    return [*tokens[:start], *[-1] * (stop - start), *tokens[stop:]]


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens must be put in, left out or replaced to make one of the other (Levenshtein 1966)."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(last[j] + 1, now[-1] + 1, last[j - 1] + (x != y)))
        last = now
    return last[-1]


def _passage(example: Example) -> Passage:
    said = [*example.is_target]
    if not example.head:  # a text without a BOS: its first token is no target, but a part of it
        said[0] = True
    best, start = (0, 0), 0
    for t in range(len(said) + 1):
        if t == len(said) or not said[t]:
            best = max(best, (start, t), key=lambda span: span[1] - span[0])
            start = t + 1
    head = example.ids[: best[0]]
    if len(head) > _MAX_HEAD:
        head = [head[0], *head[len(head) - _MAX_HEAD + 1 :]]
    return Passage(example.ids[best[0] : best[1]], head)
