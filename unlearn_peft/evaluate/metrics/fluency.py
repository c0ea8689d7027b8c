"""Is it still language? Word salad is a failure of forgetting, not a success.

Texts that the model wrote come in; repetition and the losses of these texts under the bare base go out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ...models.base import Base
from ..score import Array
from ..token_scores import adapters_off, row_tokens


def repetition(text: str, n: int = 4) -> float:
    """Return seq-rep-n, 1 - (different n-grams) / (n-grams): 0 where nothing is said twice.

    Welleck et al. 2020 (arXiv:1908.04319), over words and marks instead of a tokenizer's tokens, case folded, so
    that it tells the same of any base. A text of fewer than n words repeats nothing.
    """
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def losses_under_base(
    base: Base, prompts: Sequence[str], texts: Sequence[str], *, chat_template: bool = True, batch_size: int = 8
) -> list[Tensor]:
    """Return the loss of each token of each text, as an answer to its prompt, under the bare base: nats, (n,) a text.

    Adapters are off meanwhile. Empty texts are left out.
    """
    rows = [
        {"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True) if text.strip()
    ]  # fmt: skip
    with adapters_off(base):
        tokens = row_tokens(base, rows, what="answers", chat_template=chat_template, batch_size=batch_size)
    return [-row.answer(row.log_p) for row in tokens]


def perplexity(rows: Array) -> float:
    """Return exp of the mean loss over all tokens, from (n, 2) rows of a sum of losses and a number of tokens."""
    total, count = np.asarray(rows, dtype=np.float64).sum(0)
    return float(np.exp(total / count))
