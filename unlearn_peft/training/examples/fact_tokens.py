"""Which tokens of a forget row carry what is to be forgotten.

Of "Harry Potter was written by J.K. Rowling." the last words are the fact; the others are English, and pushing them
away is what turns answers into word salad. A word is a fact if it answers a question that does not say it already,
and few of the rows that must stay use it in their answers. No word list: it works in any language that the
retain set is in. (Forgetting chosen tokens only: Wan et al. 2025, arXiv:2506.00876, who choose them otherwise.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from ...data.tokenize import Example

_FEW_ROWS, _FEW_SHARE = 3, 0.02  # of the rows that must stay: as many use a common word at the least


def common_words(held: Sequence[Example], of_prompts: bool = False) -> set[str]:
    """Return the words in the targets (or prompts) of at least three, and at least 2 %, of the rows that must stay."""
    rows_with = Counter(
        word
        for example in held
        for word in _words(example, _inverted(example.is_target) if of_prompts else example.is_target)
    )
    least = max(_FEW_ROWS, _FEW_SHARE * len(held))
    return {word for word, rows in rows_with.items() if rows >= least}


def fact_words(forget: Sequence[Example], common: Set[str]) -> set[str]:
    """Return the words of the targets that are neither common nor said by the row's own question."""
    return {
        word
        for example in forget
        for word in _words(example, example.is_target) - _words(example, _inverted(example.is_target)) - common
    }


def mark_forget_rows(forget: Sequence[Example], facts: Set[str]) -> list[Example]:
    """Return the forget rows with their facts' tokens marked; a row without any keeps all its targets.

    What is the answer to one question counts in all rows: a name that is to be forgotten is so also in an answer to a
    question that says it.
    """
    marked = mark_facts(forget, facts)
    return [row if any(row.specific or []) else replace(row, specific=row.is_target) for row in marked]


def is_informative(word: str) -> bool:
    """Return whether a fact's word says something alone: the J of a J.K. Rowling does not."""
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


def _inverted(is_target: Sequence[bool]) -> list[bool]:
    return [not target for target in is_target]


def _words(example: Example, chosen: Sequence[bool]) -> set[str]:
    return {word for word, is_chosen in zip(example.words or [], chosen, strict=True) if is_chosen and word}


def spellings(tokenizer: Any, size: int) -> torch.Tensor:
    """Return a number for each of `size` tokens, (size,), int64; those that read alike have the same.

    Alike are " K", "K" and "k": the same text but for case and spaces. Blank tokens, parts of a character and what the
    tokenizer does not know are each like itself alone.
    """
    numbers: dict[str, int] = {}
    texts = tokenizer.batch_decode([[n] for n in range(min(size, len(tokenizer)))])
    read = [text.strip().casefold() for text in texts] + [""] * (size - len(texts))
    alone = ("" if not text or "\ufffd" in text else text for text in read)
    return torch.tensor([numbers.setdefault(text or f" {n}", n) for n, text in enumerate(alone)])
