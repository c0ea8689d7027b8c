"""TOFU's table (Maini et al. 2024, arXiv:2401.06121) of one state of a base: is it as if never learned, is it useful?

A base with whatever is attached and TOFU's four sets of rows come in; scores and the forget set's truth ratios go out.
The ratios of a model that never saw the forget set are what another model's forget quality is measured against.
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
from ..metrics.memorization import answer_probability, rouge_l
from ..metrics.truth_ratio import (
    SETS,
    choice_probability,
    forget_quality,
    forget_truth_ratio,
    model_utility,
    truth_losses,
    truth_ratio,
    utility_truth_ratio,
)
from ..score import Array, Score, score
from ..token_scores import row_tokens

_ALL = ("forget", *SETS)


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
    if lacking := [name for name in _ALL if not rows.get(name)]:
        raise DataError(f"TOFU's figures need rows of {', '.join(_ALL)}; missing: {', '.join(lacking)}")
    for name in _ALL:
        without = [n for n, row in enumerate(rows[name], 1) if not row.get("perturbed") or not row.get("completion")]
        if without:
            raise DataError(
                f"TOFU's figures need rows with 'prompt', 'completion' and 'perturbed' (a list of wrong answers); not "
                f"so in the {name} set: {len(without)} of {len(rows[name])} rows, row {without[0]} the first"
            )


def truth_ratios(base: Base, rows: Sequence[Row], *, chat_template: bool = True, batch_size: int = 8) -> Array:
    """Return the truth ratio of each row, as `measure_tofu` takes it of a retrained model."""
    return truth_ratio(*truth_losses(base, _asked(rows), chat_template=chat_template, batch_size=batch_size))


def measure_tofu(
    base: Base,
    rows: Mapping[str, Sequence[Row]],
    retrained: Array | None = None,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 8,
    forget_answers: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Tofu:
    """Measure forget quality, model utility and what they are made of.

    Args:
        base: with adapters, or without.
        rows: by set: `forget`, `retain`, `real_authors`, `world_facts`; each row with `prompt`, `completion`,
            `perturbed` (wrong answers) and, if there is one, `paraphrased`.
        retrained: truth ratios of the forget set under a model that never saw it; without them no forget quality.
        max_new_tokens: length of the greedy answers for ROUGE.
        seed: of the bootstrap.
        chat_template: see `data.tokenize`.
        batch_size: rows at a time.
        forget_answers: measure their probability and ROUGE too; the quick suite has the same two.
        progress: is told which set is being measured.

    Raises:
        DataError: see `check`.
    """
    check(rows)
    how: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    scores: list[Score] = []
    parts: dict[str, Array] = {}
    ratios = np.zeros(0)
    for name in _ALL:
        progress(name)
        asked = _asked(rows[name])
        right, wrong = truth_losses(base, asked, **how)
        ratio = truth_ratio(right, wrong)
        if name == "forget":
            ratios = ratio
            scores.append(score("forget_truth_ratio", "ratio", True, forget_truth_ratio(ratio), seed=seed))
            if not forget_answers:
                continue
        if name in ("forget", "retain"):
            probability = _probabilities(base, asked, right, how)
        else:
            probability = choice_probability(right, wrong)
        texts = answers(base, [row["prompt"] for row in asked], max_new_tokens=max_new_tokens, **how)
        rouge = rouge_l([row["completion"] for row in asked], texts)
        if name == "forget":
            scores += [
                score("forget_answer_probability", "share", False, probability, seed=seed),
                score("forget_rouge_l_recall", "share", False, rouge, seed=seed),
            ]
        else:
            parts |= {
                f"{name}_probability": probability,
                f"{name}_rouge": rouge,
                f"{name}_truth_ratio": utility_truth_ratio(ratio),
            }
    scores += [score(name, "share", True, values, seed=seed) for name, values in parts.items()]
    scores.insert(0, model_utility(parts, seed=seed))
    if retrained is not None:
        scores.insert(0, forget_quality(ratios, retrained, seed=seed))
    return Tofu(scores, ratios)


def _asked(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the answer itself where there is no paraphrase."""
    return [{**row, "paraphrased": row.get("paraphrased", row["completion"])} for row in rows]


def _probabilities(base: Base, rows: Sequence[Row], right: Array, how: Mapping[str, Any]) -> Array:
    """Return P(answer | question)^(1/|answer|) of each row; `right` holds its loss already if no row is paraphrased."""
    if all(row["paraphrased"] == row["completion"] for row in rows):
        return np.asarray(np.exp(-right))
    bare = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return answer_probability(row_tokens(base, bare, what="answers", **how))
