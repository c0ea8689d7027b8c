"""Which tokens of a forget row carry what is to be forgotten.

Of "Harry Potter was written by J.K. Rowling." the last words are the fact; the others are English, and pushing them
away is what turns answers into word salad. A token is specific if few of the rows that must stay use its word in
their answers, and the row's own question does not say it already. No word list: it works in any language that the
retain set is in. (Forgetting chosen tokens only: Wan et al. 2025, arXiv:2506.00876, who choose them otherwise.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace

from .data import Example

_FEW_ROWS, _FEW_SHARE = 3, 0.02  # of the rows that must stay: as many use a common word at the least


def common_words(held: Sequence[Example]) -> set[str]:
    """Return the words in the targets of at least three, and at least 2 %, of the rows that must stay."""
    rows_with = Counter(word for example in held for word in _words(example, targets=True))
    least = max(_FEW_ROWS, _FEW_SHARE * len(held))
    return {word for word, rows in rows_with.items() if rows >= least}


def mark_specific(forget: Sequence[Example], common: Set[str], asked: Sequence[Set[str]] = ()) -> list[Example]:
    """Return the forget rows with their specific tokens marked; a row without any keeps all its targets.

    Args:
        forget: tokenised forget rows.
        common: words that carry no fact, see `common_words`.
        asked: for each row, further words that its question has, where the row itself does not show it.
    """
    marked = []
    for n, example in enumerate(forget):
        known = common | _words(example, targets=False) | {""} | (asked[n] if asked else set())
        specific = [
            target and word not in known for word, target in zip(example.words or [], example.is_target, strict=True)
        ]
        marked.append(replace(example, specific=specific if any(specific) else example.is_target))
    return marked


def _words(example: Example, targets: bool) -> set[str]:
    return {word for word, target in zip(example.words or [], example.is_target, strict=True) if target == targets}
