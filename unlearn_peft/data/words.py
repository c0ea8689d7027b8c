"""The words of a text."""

from __future__ import annotations

import re

_NO_NAMES = set("who what which where when why how the a an in on it is name complete tell give write".split())


def names_in(text: str) -> set[str]:
    """Return the words of a text that may name the target, case folded: those with a capital, and numbers.

    In a script without capitals it is every word: too many rather than too few.
    """
    return {word.casefold() for word in re.findall(r"\w\w+", text) if not word.islower()} - _NO_NAMES


def words_of(text: str) -> set[str]:
    """Return the words of a text, case folded."""
    return {word.casefold() for word in re.findall(r"\w+", text)}
