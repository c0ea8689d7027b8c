"""A long text or row -> places in it from which the model is to go on, for self-generated rows and for measures."""

from __future__ import annotations

from typing import Any

from .tokenize import with_places


def prefixes(text: str, tokenizer: Any, count: int = 10, tokens: int = 50) -> list[tuple[str, str]]:
    """Return up to `count` pieces of a text, evenly over it, each with the text that comes after it.

    A piece and what comes after it have `tokens` tokens each; fewer where the text is shorter than both.
    """
    _, offsets = with_places(text, tokenizer)
    size = min(tokens, len(offsets) // 2)
    pieces = []
    for at in places(size, len(offsets), size, count):
        start, middle, end = offsets[at - size][0], offsets[at][0], offsets[at + size - 1][1]
        pieces.append((text[start:middle], text[middle:end]))
    return pieces


def places(first: int, end: int, size: int, count: int) -> list[int]:
    """Return up to `count` places from `first` to `end`, evenly spaced, with `size` tokens behind each to itself."""
    count = min(count, (end - first) // size) if size else 0
    return [first + round(n * (end - size - first) / max(count - 1, 1)) for n in range(count)]
