"""A step's rows of one adapter, and how they are split: into parts by tokens, into microbatches by target tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...data.batch import target_count
from ...data.tokenize import Example
from ...data.words import has_letters

STEP_TOKENS = 8192  # of one part of a step with its padding: a longer one is run in several
_LONGEST_FACT = 8  # tokens; of a longer one each part is pushed away, or none of its tokens would be


class StepRows(NamedTuple):
    """One adapter's rows of a step."""

    adapter: str
    forget: Sequence[Example]
    retain: Sequence[Example]

    def examples(self) -> list[Example]:
        """Return all rows: the forget set's, their refusals, the retain set's."""
        return [*self.forget, *(e.refusal for e in self.forget if e.refusal is not None), *self.retain]


class RowRanges(NamedTuple):
    """The rows of a microbatch: their places in `StepRows.examples()`."""

    forget: range
    refusals: range
    paired: list[int]  # for each refusal the place of its forget row in `forget`
    retain: range


def by_length(rows: Sequence[Example], max_tokens: int, max_rows: int | None = None) -> list[list[Example]]:
    """Group rows of about one length, the longest first: at most `max_tokens` a group with its padding, or one row."""
    groups: list[list[Example]] = []
    width = lines = 0
    for row in sorted(rows, key=_width, reverse=True):
        lines += 1 + (row.refusal is not None)
        if not groups or lines * width > max_tokens or len(groups[-1]) == max_rows:
            groups.append([])
            width, lines = _width(row), 1 + (row.refusal is not None)
        groups[-1].append(row)
    return groups


def padded_tokens(rows: Sequence[Example]) -> int:
    """Return how many tokens the rows and their refusals have when all are padded to the longest."""
    return max(map(_width, rows), default=0) * (len(rows) + sum(row.refusal is not None for row in rows))


def _width(row: Example) -> int:
    return max(len(row.ids), len(row.refusal.ids) if row.refusal else 0)


def split_microbatches(rows: StepRows, max_targets: int | None) -> Iterator[RowRanges]:
    """Split rows into microbatches of at most `max_targets` target tokens, or one row; None: into one microbatch.

    A forget row and its refusal stay together, since an objective compares them.
    """
    f = len(rows.forget)
    paired = [n for n, e in enumerate(rows.forget) if e.refusal is not None]
    sizes = [target_count(e) + (target_count(e.refusal) if e.refusal else 0) for e in rows.forget]
    sizes += [target_count(e) for e in rows.retain]
    first = 0
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and (max_targets is None or sum(sizes[first : last + 1]) <= max_targets):
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


def facts_of(rows: Sequence[Example]) -> list[int]:
    """Return for each target token of rows the number of its fact, from 0 over all rows; -1: it carries none.

    A fact is what stands together, `_LONGEST_FACT` tokens at most: "J.K. Rowling", "14 April", but not "Ron, Hermione".
    In a row of which nobody said what carries the fact, each target token is one.
    """
    numbers: list[int] = []
    last = -1
    for example in rows:
        previous, length = -1, 0
        for t, target in enumerate(example.is_target):
            carries = target and (example.specific is None or example.specific[t])
            if carries:
                alone = example.specific is None or not 0 < length < _LONGEST_FACT
                if alone or not _together(example, previous, t):
                    last, length = last + 1, 0
                previous, length = t, length + 1
            if target:
                numbers.append(last if carries else -1)
    return numbers


def _together(example: Example, first: int, second: int) -> bool:
    """Tell whether nothing but a blank or a mark is between two tokens, or what follows an initial."""
    if second == first + 1 or not example.characters:
        return second == first + 1
    (start, stop), (a, b) = example.characters[first], example.characters[second]
    token = example.text[a:b]
    between = example.text[stop : b - len(token.lstrip())]
    if has_letters(between) or "\n" in between:
        return False
    return len(between) == 1 or len(example.text[start:stop].strip()) == 1
