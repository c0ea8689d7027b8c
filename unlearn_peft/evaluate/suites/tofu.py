"""TOFU's table (Maini et al. 2024, arXiv:2401.06121): a base in any state and four sets of rows -> `Tofu`.

The truth ratios of a model that never saw the forget set are what another model's forget quality is measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.source import Row
from ...errors import DataError
from ...inference.generate import answers
from ...models.base import Base
from ..metrics import truth_ratio as truth
from ..metrics.memorization import answer_probability, rouge_l
from ..score import Array, Score, score
from ..token_scores import row_tokens

ANSWER_TOKENS = 200  # of an answer for ROUGE, as in open-unlearning
_ALL = ("forget", *truth.SETS)


@dataclass(frozen=True)
class Tofu:
    """TOFU's figures of one state of a base."""

    scores: list[Score]
    truth_ratios: Array  # of the forget set, one a row


def check(rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse rows that would be found unfit only after minutes.

    Raises:
        DataError: if a set is missing, or a row has no wrong answers.
    """
    if missing := [name for name in _ALL if not rows.get(name)]:
        raise DataError(f"TOFU's figures need rows of {', '.join(_ALL)}; missing: {', '.join(missing)}")
    for name in _ALL:
        unfit = [n for n, row in enumerate(rows[name], 1) if not row.get("perturbed") or not row.get("completion")]
        if unfit:
            raise DataError(
                f"TOFU's figures need rows with 'prompt', 'completion' and 'perturbed' (a list of wrong answers); not "
                f"so in the {name} set: {len(unfit)} of {len(rows[name])} rows, row {unfit[0]} the first"
            )


def truth_ratios(base: Base, rows: Sequence[Row], *, chat_template: bool = True, batch_size: int = 8) -> Array:
    """Return the truth ratio of each row, as `measure_tofu` takes it of a retrained model."""
    return truth.truth_ratio(
        *truth.truth_losses(base, _paraphrased(rows), chat_template=chat_template, batch_size=batch_size)
    )


def measure_tofu(
    base: Base,
    rows: Mapping[str, Sequence[Row]],
    retrained: Array | None = None,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 8,
    forget_answers: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Tofu:
    """Measure forget quality, model utility and what they are made of.

    `rows` are the sets `forget`, `retain`, `real_authors` and `world_facts`, each row with `prompt`, `completion`,
    `perturbed` (wrong answers) and, if there is one, `paraphrased`. `retrained` are the forget set's truth ratios under
    a model that never saw it; without them there is no forget quality. `forget_answers`: measure the probability and
    ROUGE of the forget answers too, which the quick suite has as well. `progress` is called with the name of each set.

    Raises:
        DataError: see `check`.
    """
    check(rows)
    options: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    scores: list[Score] = []
    parts: dict[str, Array] = {}
    forget_ratios = np.zeros(0)
    for name in _ALL:
        progress(name)
        part = _paraphrased(rows[name])
        right, wrong = truth.truth_losses(base, part, **options)
        ratios = truth.truth_ratio(right, wrong)
        if name == "forget":
            forget_ratios = ratios
            scores.append(score("forget_truth_ratio", "ratio", True, truth.forget_truth_ratio(ratios), seed=seed))
            if not forget_answers:
                continue
        if name in ("forget", "retain"):
            probability = _probabilities(base, part, right, options)
        else:
            probability = truth.choice_probability(right, wrong)
        asked = [row["prompt"] for row in part]
        texts = answers(base, asked, max_new_tokens=max_new_tokens, chat_template=chat_template)
        rouge = rouge_l([row["completion"] for row in part], texts)
        if name == "forget":
            scores.append(score("forget_answer_probability", "share", False, probability, seed=seed))
            scores.append(score("forget_rouge_l_recall", "share", False, rouge, seed=seed))
        else:
            values = (probability, rouge, truth.utility_truth_ratio(ratios))
            parts |= {f"{name}_{kind}": of_kind for kind, of_kind in zip(truth.PARTS, values, strict=True)}
    scores += [score(name, "share", True, values, seed=seed) for name, values in parts.items()]
    scores.insert(0, truth.model_utility(parts, seed=seed))
    if retrained is not None:
        scores.insert(0, truth.forget_quality(forget_ratios, retrained, seed=seed))
    return Tofu(scores, forget_ratios)


def _paraphrased(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the answer itself where there is no paraphrase."""
    return [{**row, "paraphrased": row.get("paraphrased", row["completion"])} for row in rows]


def _probabilities(base: Base, rows: Sequence[Row], right: Array, options: Mapping[str, Any]) -> Array:
    """Return P(answer | question)^(1/|answer|) of each row; `right` holds its loss already if no row is paraphrased."""
    if all(row["paraphrased"] == row["completion"] for row in rows):
        return np.asarray(np.exp(-right))
    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return answer_probability(row_tokens(base, pairs, what="answers", **options))
