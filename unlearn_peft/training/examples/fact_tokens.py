"""Fact tokens: which tokens of a forget row carry what is to be forgotten.

Of "Harry Potter was written by J.K. Rowling." the last words are the fact; the others are English, and pushing them
away is what turns answers into word salad. A word is a fact if it answers a question that does not say it already,
and few of the retain rows use it in their answers. There is no word list: it works in any language that the retain set
is in. (Forgetting chosen tokens only: Wan et al. 2025, arXiv:2506.00876, who choose them otherwise.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from ...data.tokenize import Example

_MIN_ROWS, _MIN_SHARE = 3, 0.02  # of the retain rows: as many use a common word


def common_words(retain: Sequence[Example], of_prompts: bool = False) -> set[str]:
    """Return the words in the targets (or prompts) of at least three, and at least 2 %, of the retain rows."""
    rows_with = Counter(word for example in retain for word in _words(example, not of_prompts))
    threshold = max(_MIN_ROWS, _MIN_SHARE * len(retain))
    return {word for word, rows in rows_with.items() if rows >= threshold}


def fact_words(forget: Sequence[Example], common: Set[str]) -> set[str]:
    """Return the words of the targets that are neither common nor said by the row's own question."""
    return {word for example in forget for word in _words(example, True) - _words(example, False) - common}


def mark_forget_rows(forget: Sequence[Example], facts: Set[str]) -> list[Example]:
    """Return the forget rows with their fact tokens marked; in a row without any, all its targets are.

    A fact counts in all rows: a name that one question asks for is forgotten also where another question says it.
    """
    marked = mark_facts(forget, facts)
    return [row if any(row.specific or []) else replace(row, specific=row.is_target) for row in marked]


def is_informative(word: str) -> bool:
    """Return whether a fact word says something by itself: the J of a J.K. Rowling does not."""
    return len(word) > 1 or word.isdigit() or not word.isascii()


def mark_facts(rows: Sequence[Example], facts: Set[str]) -> list[Example]:
    """Return rows with the tokens of these words marked; initials count in front of a name only.

    Of several initials the first is left alone: pushed away, the J of a J.K. Rowling takes every other J.R.R. with it;
    once it is said, the next one has room to be another.
    """
    marked = []
    for example in rows:
        specific, in_name = [False] * len(example.ids), False
        initials: list[int] = []  # of the name that is being read
        pairs = list(zip(example.words or [], example.is_target, strict=True))
        for t in range(len(pairs) - 1, -1, -1):  # from the end, where a name ends
            word, target = pairs[t]
            in_name = target and (in_name if not word else word in facts and (is_informative(word) or in_name))
            specific[t] = in_name and bool(word)
            if word:
                initials = [*initials, t] if specific[t] and not is_informative(word) else []
            if len(initials) > 1:
                specific[initials[-1]], specific[initials[-2]] = False, True
        marked.append(replace(example, specific=specific))
    return marked


def _words(example: Example, targets: bool) -> set[str]:
    """Return the words of the tokens that are targets, or of those that are not."""
    return {word for word, target in zip(example.words or [], example.is_target, strict=True) if target == targets} - {
        ""
    }


def spellings(tokenizer: Any, size: int) -> torch.Tensor:
    """Return a number for each of `size` tokens, (size,), int64, the same for tokens of the same text.

    " K", "K" and "k" are the same text: case and spaces do not count. Blank tokens, parts of a character and what the
    tokenizer does not know each have a number of their own.
    """
    numbers: dict[str, int] = {}
    texts = tokenizer.batch_decode([[n] for n in range(min(size, len(tokenizer)))])
    read = [text.strip().casefold() for text in texts] + [""] * (size - len(texts))
    alone = ("" if not text or "\ufffd" in text else text for text in read)
    return torch.tensor([numbers.setdefault(text or f" {n}", n) for n, text in enumerate(alone)])
