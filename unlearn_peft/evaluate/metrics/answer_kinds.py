"""What kind of answer each is: it names what is to be forgotten, it abstains, it is word salad, or it says else.

"Else" is another fact, true or made up ("the author is J.R.R. Tolkien"), or talk without one: nobody judges that here,
so its share is the most that false statements can have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    alike = [
        rouge_l([refusal] * len(texts), [text.lstrip()[: int(_BEGINNING * len(refusal))] for text in texts])
        for refusal in refusals
    ]
    return np.asarray(np.max(alike, axis=0) >= _LIKE_A_REFUSAL, dtype=np.float64)


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
    options: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    losses = iter(losses_under_base(base, asked, texts, **options))  # of all but empty texts
    limit = _SALAD * math.log(vocabulary(base.model))
    salad = [not text.strip() or float(next(losses).mean()) > limit for text in texts]
    leaking = [bool(leaked(text, words)) for answers, words in zip(samples, leaks, strict=True) for text in answers]
    kind = np.select([np.array(leaking), abstains(texts, refusals) > 0, np.array(salad)], [0, 1, 2], 3)
    of_prompt = np.split(kind, np.cumsum([len(answers) for answers in samples])[:-1])
    return {name: np.array([np.mean(part == n) for part in of_prompt]) for n, name in enumerate(KINDS)}
