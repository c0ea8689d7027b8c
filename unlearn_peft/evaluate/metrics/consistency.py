"""Does an answer still say the same, and is it right? Told by the names in it, without a model to judge it.

Answers come in, before and with an adapter or beside what is right; whether they agree goes out, for each question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ...data.words import names_in
from ..score import Array

_END = re.compile(r"(?<=[^\W\d_A-Z]{2})[.!?](?=\s|$)|\n")  # not after an initial


def entities_in(prompt: str, answer: str) -> set[str]:
    """Return the names and numbers in an answer's first sentence that its question does not say, case folded.

    The first word of the sentence is not looked at: it has a capital whatever it is.
    """
    sentence = _END.split(answer.strip(), maxsplit=1)[0]
    return names_in(re.sub(r"^\W*\w+", "", sentence)) - names_in(prompt)


def same_entities(prompts: Sequence[str], before: Sequence[str], now: Sequence[str]) -> Array:
    """Return for each question whether both answers name the same, 0 or 1.

    The measure is strict with a base that makes names up: another made-up name is a change. An answer that was cut
    off in its first sentence is compared as far as it goes.
    """
    triples = zip(prompts, before, now, strict=True)
    return np.array([float(entities_in(q, one) == entities_in(q, other)) for q, one, other in triples])


def contains_gold(prompts: Sequence[str], rows: Sequence[str], said: Sequence[str]) -> Array:
    """Return for each question whether its answer has all names and numbers that its row's answer has, 0 or 1.

    A question whose row names nothing that is not in the question itself is left out: there is nothing to look for.
    It tells facts from names that a base makes up: those change easily, and nothing is lost with them.
    """
    wanted = [entities_in(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    return np.array([float(names <= names_in(text)) for names, text in zip(wanted, said, strict=True) if names])
