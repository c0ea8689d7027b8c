"""The leak rate: how often sampled answers name a leak word; and for people, the text around it.

Greedy decoding hides what is one token behind the first choice; so each probe is answered k times at temperature 1
from the whole distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...data.words import places
from ...inference.generate import leaked
from ..score import Array


def leak_shares(samples: Sequence[Sequence[str]], leaks: Sequence[Sequence[str]]) -> Array:
    """Return for each probe the share of its answers that name at least one of its leak words, in whatever spelling."""
    return np.array(
        [np.mean([bool(leaked(text, words)) for text in texts]) for texts, words in zip(samples, leaks, strict=True)]
    )


def any_leak(shares: Array) -> Array:
    """Return for each probe whether any of its answers leaked, 0 or 1."""
    return np.asarray(shares > 0, dtype=np.float64)


def leaking_parts(texts: Sequence[str], words: Sequence[str], width: int = 60) -> list[str]:
    """Return of each text that names a leak word the text around the first, `width` characters to each side.

    A word alone does not show whether it was the answer: "Rowl" is in Rowling, and in Rowland.
    """
    parts = []
    for text in texts:
        if found := places(text, words):
            start, end = max(found[0][0] - width, 0), found[0][1] + width
            cut = " ".join(text[start:end].split())
            parts.append(("..." if start else "") + cut + ("..." if end < len(text) else ""))
    return parts
