"""The package's own rows of general knowledge, trained on beside a retain set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .rows import question_of, texts_of
from .source import Row
from .words import words_in

_ANCHORS = Path(__file__).parent / "anchors.jsonl"
_FEW = 2  # anchors that say a word: it is one of theirs, and no word of every day
_LEFT = 0.5  # of the anchors at least: a long forget set says something of almost each


def anchors(forget: Sequence[Row], *never: Sequence[Row]) -> list[Row]:
    """Return the package's own rows, without those that share a word of their own with a forget row, or are in `never`.

    The retain set of an erasure request is often small and all about one thing; these rows hold the rest of the model.
    A word of their own is one that few of them say: a name, mostly. Where that would leave less than half of them,
    those go that share most with one row, and of them first those whose word is rare among the forget rows too.
    `never`: sets that must not be trained on, such as probes; a row that asks the same is left out.
    """
    rows: list[Row] = [json.loads(line) for line in _ANCHORS.read_text(encoding="utf-8").splitlines()]
    words = [_words(row) for row in rows]
    said_by = Counter(word for said in words for word in said)
    own = [{word for word in said if said_by[word] <= _FEW} for said in words]
    of_any = set().union(*own)
    mentions: Counter[str] = Counter()
    together = [0] * len(rows)  # the most words of its own that one forget row says, by anchor
    for row in forget:
        mentioned = of_any & _words(row)
        mentions.update(mentioned)
        together = [max(most, len(mentioned & mine)) for most, mine in zip(together, own, strict=True)]

    def likeness(n: int) -> tuple[int, int]:
        return together[n], -min((mentions[word] for word in own[n] if mentions[word]), default=0)

    alike = sorted((n for n in range(len(rows)) if together[n]), key=likeness, reverse=True)
    gone = set(alike[: int(len(rows) * (1 - _LEFT))])
    excluded = {question_of(row) for one_set in never for row in one_set}
    return [row for n, row in enumerate(rows) if n not in gone and question_of(row) not in excluded]


def _words(row: Row) -> set[str]:
    return {word for text in texts_of(row) for word in words_in(text) if len(word) > 1}
