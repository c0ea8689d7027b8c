"""Texts that the model wrote -> their repetition, and their losses under the bare base: is it still language?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ...data.words import segments
from ...models.base import Base
from ..score import Array, per_token
from ..token_scores import adapters_off, row_tokens


def repetition(text: str, n: int = 4) -> float:
    """Return seq-rep-n, 1 - (different n-grams) / (n-grams); 0 for a text of fewer than n words.

    Welleck et al. 2020 (arXiv:1908.04319), over words and marks, normalized, instead of a tokenizer's tokens, so that
    bases can be compared; in a script without spaces over letters.
    """
    words = segments(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def losses_under_base(
    base: Base, prompts: Sequence[str], texts: Sequence[str], *, chat_template: bool = True, batch_size: int = 8
) -> list[Tensor]:
    """Return the loss of each token of each text, as an answer to its prompt, under the bare base: nats, (n,) a text.

    Adapters are off meanwhile. Empty texts are left out.
    """
    pairs = zip(prompts, texts, strict=True)
    rows = [{"prompt": prompt, "completion": text} for prompt, text in pairs if text.strip()]
    with adapters_off(base):
        tokens = row_tokens(base, rows, what="answers", chat_template=chat_template, batch_size=batch_size)
    return [-row.answer(row.log_p) for row in tokens]


def perplexity(rows: Array) -> float:
    """Return exp of the mean loss over all tokens, from what `sums` makes of losses."""
    return float(np.exp(per_token(rows)))
