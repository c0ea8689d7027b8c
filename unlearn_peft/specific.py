"""Which tokens of a forget row carry what is to be forgotten.

Of "Harry Potter was written by J.K. Rowling." the last words are the fact; the others are English, and pushing them
away is what turns answers into word salad. A token is specific if few of the rows that must stay use its word in
their answers, and the row's own question does not say it already. No word list: it works in any language that the
retain set is in. (Forgetting chosen tokens only: Wan et al. 2025, arXiv:2506.00876, who choose them otherwise.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from .data import Example

_FEW_ROWS, _FEW_SHARE = 3, 0.02  # of the rows that must stay: as many use a common word at the least


def common_words(held: Sequence[Example]) -> set[str]:
    """Return the words in the targets of at least three, and at least 2 %, of the rows that must stay."""
    rows_with = Counter(word for example in held for word in _words(example, example.is_target))
    least = max(_FEW_ROWS, _FEW_SHARE * len(held))
    return {word for word, rows in rows_with.items() if rows >= least}


def mark_specific(forget: Sequence[Example], common: Set[str]) -> list[Example]:
    """Return the forget rows with their specific tokens marked; a row without any keeps all its targets."""
    marked = []
    for example in forget:
        known = common | _words(example, [not target for target in example.is_target])
        specific = _mark(example, lambda word, known=known: word not in known)  # type: ignore[misc]
        marked.append(replace(example, specific=specific if any(specific) else example.is_target))
    return marked


def facts_of(forget: Sequence[Example]) -> set[str]:
    """Return the words of the specific tokens of marked rows, but for single letters: they are in other words too."""
    words = {word for example in forget for word in _words(example, example.specific or example.is_target)}
    return {word for word in words if len(word) > 1}


def mark_facts(answers: Sequence[Example], facts: Set[str]) -> list[Example]:
    """Return answers with the tokens of these words marked, where the question does not say them already."""
    marked = []
    for example in answers:
        named = facts - _words(example, [not target for target in example.is_target])
        marked.append(replace(example, specific=_mark(example, named.__contains__)))
    return marked


def _mark(example: Example, is_specific: Callable[[str], bool]) -> list[bool]:
    pairs = zip(example.words or [], example.is_target, strict=True)
    return [target and bool(word) and is_specific(word) for word, target in pairs]


def _words(example: Example, chosen: Sequence[bool]) -> set[str]:
    return {word for word, is_chosen in zip(example.words or [], chosen, strict=True) if is_chosen and word}
