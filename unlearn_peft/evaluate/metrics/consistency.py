"""Does an answer still say the same, and is it right? Decided by the names in it, without a model to judge it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ...data.words import names_in
from ..score import Array

_END = re.compile(r"(?<=[^\W\d_A-Z]{2})[.!?](?=\s|$)|\n")  # not after an initial


def entities_in(prompt: str, answer: str) -> set[str]:
    """Return the names and numbers in an answer's first sentence that are not in its question, case folded.

    The first word of the sentence is ignored: it has a capital whatever it is.
    """
    sentence = _END.split(answer.strip(), maxsplit=1)[0]
    return names_in(re.sub(r"^\W*\w+", "", sentence)) - names_in(prompt)


def same_entities(prompts: Sequence[str], before: Sequence[str], now: Sequence[str]) -> Array:
    """Return for each question whether both answers name the same, 0 or 1.

    The measure is strict with a base that makes names up: another made-up name is a change. An answer that was cut
    off in its first sentence is compared as far as it goes.
    """
    triples = zip(prompts, before, now, strict=True)
    return np.array([float(entities_in(q, first) == entities_in(q, second)) for q, first, second in triples])


def contains_gold(prompts: Sequence[str], gold: Sequence[str], texts: Sequence[str]) -> Array:
    """Return for each question whether its answer has all names and numbers of the gold answer, 0 or 1.

    Questions whose gold answer names nothing new are left out. Unlike `same_entities` this does not count names that a
    base makes up: those change easily, and nothing is lost with them.
    """
    entities = [entities_in(prompt, answer) for prompt, answer in zip(prompts, gold, strict=True)]
    return np.array([float(names <= names_in(text)) for names, text in zip(entities, texts, strict=True) if names])
