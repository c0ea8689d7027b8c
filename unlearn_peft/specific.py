"""Which tokens of a forget row carry what is to be forgotten.

Of "Harry Potter was written by J.K. Rowling." the last words are the fact; the others are English, and pushing them
away is what turns answers into word salad. A token is specific if few of the rows that must stay use its word in
their answers, and the row's own question does not say it already. No word list: it works in any language that the
retain set is in. (Forgetting chosen tokens only: Wan et al. 2025, arXiv:2506.00876, who choose them otherwise.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from .data import Example

_FEW_ROWS, _FEW_SHARE = 3, 0.02  # of the rows that must stay: as many use a common token at the least


def mark_specific(forget: Sequence[Example], held: Sequence[Example]) -> list[Example]:
    """Return the forget rows with their specific tokens marked; a row without any keeps all its targets.

    Args:
        forget: tokenised forget rows.
        held: tokenised rows that must stay (the retain set and the package's own rows).
    """
    rows_with = Counter(word for example in held for word in _words(example, targets=True))
    least = max(_FEW_ROWS, _FEW_SHARE * len(held))
    common = {word for word, rows in rows_with.items() if rows >= least}
    marked = []
    for example in forget:
        known = common | _words(example, targets=False) | {""}
        specific = [
            target and word not in known
            for word, target in zip(example.words or [], example.is_target, strict=True)
        ]
        marked.append(replace(example, specific=specific if any(specific) else example.is_target))
    return marked


def _words(example: Example, targets: bool) -> set[str]:
    return {word for word, target in zip(example.words or [], example.is_target, strict=True) if target == targets}
