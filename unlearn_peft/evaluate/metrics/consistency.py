"""Does an answer still say the same, and is it right? Decided by words, without a model to judge it.

The same: it has all the words of the base's first sentence that the question does not say. That is strict: another
wording counts as a change, but no name can change unseen. Right: it has the words of the gold answer that carry the
facts, which the bare base tells (`inference/contrast.py`); they come in as spans.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import groupby

import numpy as np
import regex

from ...data.words import word_matches, word_runs, words_in
from ..score import Array

# the end of a sentence; a full stop after an initial or a number is none
_END = regex.compile(r"[\p{STerm}--[.]]|(?<=[\p{L}\p{M}]{3})\.(?=\s|$)|\n", regex.V1)
_INITIAL = regex.compile(r"\p{Ll}")


def facts_in(question: str, answer: str, spans: Sequence[tuple[int, int]] = ()) -> set[str]:
    """Return the facts in an answer's first sentence, normalized: words, or in Chinese runs of letters.

    They are the words that `spans` touch, each from and to a character of the answer; without a span in the first
    sentence, those of all spans. Without spans they are all words of the sentence that the question does not say, or
    where it says each ("Is it Rome or Milan?"), all words. A letter alone, an initial, counts where nothing else is.
    """
    end = next((m.start() for m in _END.finditer(answer) if words_in(answer[: m.start()])), len(answer))
    texts, said = [answer[:end]], set(words_in(question))
    if spans:
        places = [match.span() for match in word_matches(answer)]
        touched = [
            [(a, b) for a, b in places if a < stop and b > start]
            for start, stop in [span for span in spans if span[0] < end] or spans
        ]
        texts, said = [answer[words[0][0] : words[-1][1]] for words in touched if words], set()
    runs = [run for text in texts for run in word_runs(text)]
    facts = {" ".join(part) for run in runs for old, part in groupby(run, said.__contains__) if not old}
    facts = facts or {" ".join(run) for run in runs}
    return {fact for fact in facts if not _INITIAL.fullmatch(fact)} or facts


def says_all(facts: Sequence[Set[str]], texts: Sequence[str]) -> Array:
    """Return for each answer whether it says all the facts, from `facts_in`, 0 or 1.

    Of a base's own earlier answers they tell whether it still says the same: strictly with a base that makes facts up,
    for another made-up one is a change. Of the rows' answers they tell whether it is right. Where there are no facts,
    an answer should have no words either.
    """

    def says(wanted: Set[str], text: str) -> bool:
        words = words_in(text)
        return all(f" {fact} " in f" {' '.join(words)} " for fact in wanted) if wanted else not words

    return np.array([float(says(wanted, text)) for wanted, text in zip(facts, texts, strict=True)])
