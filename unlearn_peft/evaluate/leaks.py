"""How often the forgotten answer comes out when the model is asked again and again.

Greedy decoding hides what is one token behind the first choice; so each probe is answered k times at temperature 1
from the whole distribution. Per-probe numbers go out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..base import Base
from ..data import Row
from ..generate import leaked, sampled
from .score import Array


def leak_shares(samples: Sequence[Sequence[str]], leaks: Sequence[Sequence[str]]) -> Array:
    """Return for each probe the share of its answers that name at least one of its leak words, case ignored."""
    return np.array(
        [np.mean([bool(leaked(text, words)) for text in texts]) for texts, words in zip(samples, leaks, strict=True)]
    )


def any_leak(shares: Array) -> Array:
    """Return for each probe whether any of its answers leaked, 0 or 1."""
    return np.asarray(shares > 0, dtype=np.float64)


def sampled_leaks(
    base: Base,
    probes: Sequence[Row],
    *,
    k: int = 32,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: bool = True,
) -> Array:
    """Return `leak_shares` of k sampled answers to each probe (rows with `prompt` and `leak` words)."""
    samples = sampled(
        base, [row["prompt"] for row in probes], count=k, temperature=temperature, max_new_tokens=max_new_tokens,
        seed=seed, chat_template=chat_template,
    )  # fmt: skip
    return leak_shares(samples, [row["leak"] for row in probes])
