"""TOFU's two axes: forget quality (is it as if never learned?) and model utility (is the rest still there?).

Definitions of Maini et al. 2024, arXiv:2401.06121. Mean losses of right and wrong answers (nats/token) -> truth ratios,
a p-value and one utility.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ...data.source import Row
from ...errors import DataError
from ...models.base import Base
from ..score import Array, Score, extra, score
from ..token_scores import row_tokens

SETS, PARTS = ("retain", "real_authors", "world_facts"), ("probability", "rouge", "truth_ratio")
NINE = [f"{rows}_{part}" for rows in SETS for part in PARTS]  # what model utility is made of


def truth_ratio(right: ArrayLike, wrong: ArrayLike, *, mean: Literal["geometric", "arithmetic"] = "geometric") -> Array:
    """Return how likely wrong answers are relative to a right one: `mean P(wrong)^(1/|wrong|) / P(right)^(1/|right|)`.

    `right` is the mean loss of the paraphrased right answer of each question, (n,), `wrong` the mean losses of its
    perturbed answers, (n, m); `mean` is over the m. TOFU's published figures, its code and open-unlearning take the
    geometric mean (the mean of the losses); the formula in the paper is written with the arithmetic one.
    """
    losses = np.asarray(wrong, dtype=np.float64)  # (n, m)
    if mean == "geometric":
        wrong_log_p = -losses.mean(1)
    else:
        wrong_log_p = np.logaddexp.reduce(-losses, axis=1) - np.log(losses.shape[1])
    return np.asarray(np.exp(wrong_log_p + np.asarray(right, dtype=np.float64)))


def forget_truth_ratio(ratios: ArrayLike) -> Array:
    """Return min(R, 1/R) of each truth ratio: 1 where right and wrong are equally likely."""
    r = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(r, 1 / r))


def utility_truth_ratio(ratios: ArrayLike) -> Array:
    """Return max(0, 1 - R) of each truth ratio: 1 where only the right answer is likely."""
    return np.asarray(np.maximum(0, 1 - np.asarray(ratios, dtype=np.float64)))


def choice_probability(right: ArrayLike, wrong: ArrayLike) -> Array:
    """Return P(right) / (P(right) + sum of P(wrong)) of each question, from mean losses (n,) and (n, m).

    TOFU's probability on real authors and world facts, whose questions come with options.
    """
    p, q = np.exp(-np.asarray(right, dtype=np.float64)), np.exp(-np.asarray(wrong, dtype=np.float64))
    return np.asarray(p / (p + q.sum(1)))


def ks_test(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p-value of the two-sided two-sample Kolmogorov-Smirnov test.

    Raises:
        UnlearnError: if scipy is not installed.
    """
    return float(extra("scipy.stats").ks_2samp(np.asarray(first), np.asarray(second)).pvalue)


def forget_quality(unlearned: ArrayLike, retrained: ArrayLike, *, resamples: int = 200, seed: int = 0) -> Score:
    """Return TOFU's forget quality: do the truth ratios differ from those of a model that never saw the rows?

    The figure is the p-value of the KS test (its logarithm is what TOFU plots): near 1, no difference is seen. The
    interval is of p under resampling of both sets; resampled sets differ more than the sets themselves, so it lies low.

    `unlearned` and `retrained` are truth ratios of the forget set, the second under a model trained on the retain set
    alone.
    """
    samples = (unlearned, retrained)
    return score("forget_quality", "p-value", True, *samples, statistic=ks_test, resamples=resamples, seed=seed)


def model_utility(parts: Mapping[str, ArrayLike], *, resamples: int = 1000, seed: int = 0) -> Score:
    """Return TOFU's model utility: the harmonic mean of nine means, 0 as soon as one of them is 0.

    `parts` are per-row numbers by name, {retain, real_authors, world_facts}_{probability, rouge, truth_ratio}:
    probability by `answer_probability` on retain and by `choice_probability` on the other two, rouge by `rouge_l`,
    truth_ratio by `utility_truth_ratio`.

    Raises:
        DataError: if a part is missing or unknown, or a number is below 0.
    """
    if set(parts) != set(NINE):
        missing, unknown = sorted(set(NINE) - set(parts)), sorted(set(parts) - set(NINE))
        raise DataError(
            f"model utility is made of nine parts; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    arrays = [np.asarray(parts[name], dtype=np.float64) for name in NINE]
    if any((array < 0).any() for array in arrays):
        raise DataError("model utility is made of shares between 0 and 1: found a number below 0")
    return score("model_utility", "share", True, *arrays, statistic=_harmonic, resamples=resamples, seed=seed)


def check_wrong_answers(rows: Sequence[Row]) -> int:
    """Return how many wrong answers each row has.

    Raises:
        DataError: if a row has no `prompt`, `paraphrased` or `perturbed`, or rows differ in the number of these.
    """
    if any(not {"prompt", "paraphrased", "perturbed"} <= row.keys() for row in rows):
        raise DataError("the truth ratio needs rows with 'prompt', 'paraphrased' and 'perturbed'")
    for row in rows:
        wrong = row["perturbed"] if isinstance(row["perturbed"], (list, tuple)) else [None]
        if not all(isinstance(text, str) and text.strip() for text in (row["prompt"], row["paraphrased"], *wrong)):
            raise DataError("'paraphrased' of a row must be a text, 'perturbed' a list of texts")
    counts = {len(row["perturbed"]) for row in rows}
    if len(counts) != 1 or 0 in counts:
        raise DataError(f"the truth ratio needs as many wrong answers for each row; found {sorted(counts)}")
    return counts.pop()


def truth_losses(
    base: Base, rows: Sequence[Row], *, chat_template: bool = True, batch_size: int = 8
) -> tuple[Array, Array]:
    """Return the mean losses (nats/token) of right and wrong answers, (n,) and (n, m).

    Rows have `prompt`, `paraphrased` (a right answer in other words, or the answer itself) and `perturbed` (m wrong
    ones). A batch never holds more than the answers to one question, which share its tokens.

    Raises:
        DataError: see `check_wrong_answers`.
    """
    count = 1 + check_wrong_answers(rows)
    pairs = [
        {"prompt": row["prompt"], "completion": answer}
        for row in rows
        for answer in (row["paraphrased"], *row["perturbed"])
    ]
    tokens = row_tokens(base, pairs, what="truth ratio", chat_template=chat_template, batch_size=min(batch_size, count))
    losses = np.array([row.loss for row in tokens]).reshape(len(rows), -1)
    return losses[:, 0], losses[:, 1:]


def _harmonic(*samples: Array) -> float:
    means = np.array([sample.mean() for sample in samples])
    return float(len(means) / (1 / means).sum()) if (means > 0).all() else 0.0
