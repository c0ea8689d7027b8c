"""The words of a text. In a script without spaces, such as Chinese, a "word" is a run of letters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import regex  # type: ignore[import-untyped]

_NO_NAMES = set("who what which where when why how the a an in on it is name complete tell give write".split())


def word_matches(text: str) -> Iterator[re.Match[str]]:
    """Find each word of a text, with its place."""
    return (m for m in regex.finditer(r"(?w)\b.+?\b", text, regex.DOTALL) if regex.search(r"\w", m.group()))


def words_of(text: str) -> set[str]:
    """Return the words of a text, case folded."""
    return {match.group().casefold() for match in word_matches(text)}


def long_words(text: str) -> list[str]:
    """Return the words of two characters or more, in order and in their own case."""
    return re.findall(r"\w\w+", text)


def names_in(text: str) -> set[str]:
    """Return the words of a text that may be names, case folded: long words with a capital, and numbers.

    In a script without capitals it is every long word: too many rather than too few.
    """
    return {word.casefold() for word in long_words(text) if not word.islower()} - _NO_NAMES


def last_words(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return the last word, case folded, that each span of characters overlaps; "" for none."""
    word_at = [""] * len(text)
    for match in word_matches(text):
        word_at[match.start() : match.end()] = [match.group().casefold()] * (match.end() - match.start())
    return [next((word for word in reversed(word_at[start:end]) if word), "") for start, end in spans]
