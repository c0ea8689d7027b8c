"""A step's rows of one adapter, and how they are cut into pieces of whole rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...data.tokenize import Example


class StepRows(NamedTuple):
    """One adapter's rows of a step."""

    adapter: str
    forget: Sequence[Example]
    retain: Sequence[Example]

    def examples(self) -> list[Example]:
        """Return all rows: the forget set's, their refusals, the retain set's."""
        return [*self.forget, *(e.refusal for e in self.forget if e.refusal is not None), *self.retain]


class RowRanges(NamedTuple):
    """A piece: numbers of rows in `StepRows.examples()`."""

    forget: range
    refusals: range
    paired: list[int]  # for each refusal the place of its forget row in `forget`
    retain: range


def split_microbatches(work: StepRows, most: int | None) -> Iterator[RowRanges]:
    """Cut a work into pieces of at most `most` target tokens, or one row; None: into one piece.

    A forget row and its refusal stay together, since an objective compares them.
    """
    f = len(work.forget)
    paired = [n for n, e in enumerate(work.forget) if e.refusal is not None]
    sizes = [target_count(e) + (target_count(e.refusal) if e.refusal else 0) for e in work.forget]
    sizes += [target_count(e) for e in work.retain]
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and (most is None or sum(sizes[first : last + 1]) <= most):
            last += 1
        refused = [k for k, n in enumerate(paired) if first <= n < last]
        start = f + (refused[0] if refused else 0)
        yield RowRanges(
            range(min(first, f), min(last, f)),
            range(start, start + len(refused)),
            [paired[k] - first for k in refused],
            range(len(paired) + max(first, f), len(paired) + max(last, f)),
        )
        first = last


def target_count(example: Example) -> int:
    """Return how many of a row's tokens are counted."""
    return sum(example.is_target)


def labels_of(rows: Sequence[Example]) -> list[int]:
    """Return the target tokens of rows, in order."""
    return [i for e in rows for i, target in zip(e.ids, e.is_target, strict=True) if target]


def specific_of(rows: Sequence[Example]) -> list[bool]:
    """Return for each target token of rows whether it carries the fact."""
    return [s for e in rows for s, t in zip(e.specific or e.is_target, e.is_target, strict=True) if t]
