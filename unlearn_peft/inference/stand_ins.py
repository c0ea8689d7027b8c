"""Rows with a made-up name in the place of what they are about, and how to find what that is.

No language is known here: the subject of a question is a run of words that comes again in an answer.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from ..data.rows import answer_texts, question_texts
from ..data.source import Row
from ..data.words import word_matches

_MAX_SUBJECT = 8  # words
_SEARCHED_SUBJECT = 4  # words, where no part of the question comes again in an answer
_CANDIDATES, _SEARCHED = 5, 24  # subjects that are tried for each row
_INDEXED = 512  # words of an answer
_LONG = 4  # letters, of which a Korean syllable has two or three


def made_up(name: str, seed: str) -> str:
    """Return a name that nobody has: the letters of `name` in another order, its digits drawn anew.

    So it is in the same script, about as long, and has capitals in the same places, where there are any.
    """
    draw = random.Random(f"{seed} {name}")
    letters = [c for c in name if c.isalpha()]
    for _ in range(8):
        draw.shuffle(letters)
        order = iter(letters)
        text = "".join(_like(c, next(order)) if c.isalpha() else _digit(c, draw) for c in name)
        if text != name:
            return text
    return name + name  # one letter, or one letter again and again


def _like(old: str, new: str) -> str:
    return new.upper() if old.isupper() else new.lower()


def _digit(old: str, draw: random.Random) -> str:
    return str(draw.randrange(10)) if old.isdigit() else old


class SubjectIndex:
    """The runs of words that answers hold, to find the part of a question that comes again in one."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._all = {run for row in rows for run in _runs(row)}

    def candidates(self, row: Row) -> list[str]:
        """Return what may be the subject of a row: the longest runs that come again, or else all short ones.

        They come again in the row's own answer, or, where nothing of them does, in another row's.
        """
        found: dict[str, None] = {}
        for question in question_texts(row):
            places = [m.span() for m in word_matches(question)]
            words = [question[a:b].casefold() for a, b in places]
            taken: set[int] = set()
            for runs in (_runs(row), self._all):
                new: set[int] = set()
                for i in range(len(words)):
                    lengths = range(min(_MAX_SUBJECT, len(words) - i), 0, -1)
                    length = next((n for n in lengths if hash(tuple(words[i : i + n])) in runs), 0)
                    run = set(range(i, i + length))
                    if length and not run & taken and not run <= new:
                        found[question[places[i][0] : places[i + length - 1][1]]] = None
                        new |= run
                taken |= new
        return sorted(found, key=len, reverse=True)[:_CANDIDATES] or _short_runs(question_texts(row))


def _runs(row: Row) -> set[int]:
    """Return a number for each run of words in a row's answers."""
    runs = set()
    for text in answer_texts(row):
        words = [m.group().casefold() for m in word_matches(text)][:_INDEXED]
        runs |= {hash(tuple(words[i : i + n])) for n in range(1, _MAX_SUBJECT + 1) for i in range(len(words) - n + 1)}
    return runs


def _short_runs(questions: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for question in questions:
        places = [m.span() for m in word_matches(question)]
        for n in range(1, _SEARCHED_SUBJECT + 1):
            found.update({question[places[i][0] : places[i + n - 1][1]]: None for i in range(len(places) - n + 1)})
    return list(found)[:_SEARCHED]


def replaced_row(row: Row, others: Mapping[str, str]) -> Row:
    """Return a row with other words for some in all its texts but a plain one; case does not matter."""

    def replaced(text: str) -> str:
        return "".join(piece for piece, _, _ in pieces(text, others))

    if "messages" in row:
        return {**row, "messages": [{**m, "content": replaced(str(m["content"]))} for m in row["messages"]]}
    return {**row, **{key: replaced(row[key]) for key in ("prompt", "completion") if key in row}}


def pieces(text: str, others: Mapping[str, str]) -> Iterator[tuple[str, int, bool]]:
    """Yield the pieces of a text with other words for some: the piece, where it was, whether it is as it was.

    Short ones are replaced as whole words alone: "Er" is no part of "erhalten".
    """
    other_of = {old.casefold(): other for old, other in others.items()}
    start, edges = 0, {edge for m in word_matches(text) for edge in m.span()}
    for match in re.finditer("|".join(map(re.escape, sorted(others, key=len, reverse=True))), text, re.IGNORECASE):
        old, end = match.group(), match.end()
        whole = match.start() in edges and (end in edges or not text[end : end + 1].isalpha())
        if not whole and len(unicodedata.normalize("NFD", old)) < _LONG:
            continue
        yield text[start : match.start()], start, True
        yield other_of.get(old.casefold(), old), match.start(), False
        start = end
    yield text[start:], start, True
