"""What kind of answer each is: it names what is to be forgotten, it abstains, it is word salad, or it says else.

"Else" is another fact, true or made up ("the author is J.R.R. Tolkien"), or talk without one: nobody judges that here,
so its share is the most that false statements can have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...inference.generate import leaked
from ...models.base import Base
from ...models.layers import vocabulary
from ..score import Array
from .fluency import losses_under_base
from .memorization import rouge_l

KINDS = ("leaks", "abstains", "word_salad", "says_else")
_LIKE_A_REFUSAL = 0.8  # of a refusal's words are in the answer's beginning, in their order
_BEGINNING = 1.5  # times as long as the refusal
_SALAD = 0.5  # of the loss of tokens drawn evenly from all


def abstains(texts: Sequence[str], refusals: Sequence[str]) -> Array:
    """Return whether each answer begins with one of the refusals, or nearly so, 0 or 1."""
    return np.array([_most_alike(text, refusals) >= _LIKE_A_REFUSAL for text in texts], dtype=np.float64)


def kinds_of_answers(
    base: Base,
    prompts: Sequence[str],
    samples: Sequence[Sequence[str]],
    leaks: Sequence[Sequence[str]],
    refusals: Sequence[str],
    *,
    chat_template: bool = True,
    batch_size: int = 8,
) -> dict[str, Array]:
    """Return for each of `KINDS` its share of each prompt's answers, (prompts,); the kinds sum to 1.

    The first that holds counts. Word salad is an answer whose mean loss under the bare base is above half of that of
    random tokens, ln(V) / 2 nats/token, or that is empty.
    """
    asked = [prompt for prompt, texts in zip(prompts, samples, strict=True) for _ in texts]
    texts = [text for texts in samples for text in texts]
    written = [bool(text.strip()) for text in texts]
    options = {"chat_template": chat_template, "batch_size": batch_size}
    losses = iter(losses_under_base(base, asked, texts, **options))  # type: ignore[arg-type]
    limit = _SALAD * math.log(vocabulary(base.model))
    salad = [not text or float(next(losses).mean()) > limit for text in written]
    refusing = abstains(texts, refusals)
    shares = {kind: np.zeros(len(prompts)) for kind in KINDS}
    n = 0
    for row, (answers, words) in enumerate(zip(samples, leaks, strict=True)):
        for text in answers:
            flags = (bool(leaked(text, words)), bool(refusing[n]), salad[n], True)
            shares[KINDS[flags.index(True)]][row] += 1 / len(answers)
            n += 1
    return shares


def _most_alike(text: str, refusals: Sequence[str]) -> float:
    """Return the largest share of a refusal's words that an answer's beginning has in their order."""
    beginnings = [text.lstrip()[: int(_BEGINNING * len(refusal))] for refusal in refusals]
    return max(rouge_l(refusals, beginnings), default=0.0)
