"""What the full suite has beside the quick one: memorization as in MUSE, membership attacks, the truth ratio.

A base in any state and sets of rows come in; a list of `Score` goes out. What has no rows is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...data.rows import question_answer_pairs
from ...data.source import Row
from ...errors import DataError
from ...models.base import Base
from ..metrics.membership import membership
from ..metrics.memorization import knowledge_memorization, verbatim_memorization
from ..metrics.truth_ratio import check_wrong_answers, forget_truth_ratio, truth_losses, truth_ratio
from ..score import Score, score


def check(rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse rows that would be found unfit only after minutes.

    Raises:
        DataError: if there are held-out rows but no forget rows; see also `check_wrong_answers`.
    """
    if rows.get("holdout") and not rows.get("forget"):
        raise DataError("held-out rows are compared with the forget rows: name these too")
    if with_wrong := _with_wrong_answers(rows.get("forget", [])):
        check_wrong_answers(with_wrong)


def measure(
    base: Base, rows: Mapping[str, Sequence[Row]], *, seed: int = 0, chat_template: bool = True, batch_size: int = 8
) -> list[Score]:
    """Measure a base in the state that it is in; for the arguments see `quick.measure`.

    Uses the sets `forget` (for the truth ratio with `paraphrased` and `perturbed`), `retain`, and `holdout`, rows like
    the forget rows that the base has never seen. Verbatim and knowledge memorization ask as MUSE does: plain text,
    answers of 128 and 32 tokens. Of the six membership attacks the one that needs a reference model is left out.
    """
    scores = []
    for name in ("forget", "retain"):
        part, better = rows.get(name, []), name == "retain"
        verbatim = verbatim_memorization(base, part)
        if len(verbatim):
            scores.append(score(f"{name}_verbatim_memorization", "percent", better, verbatim, seed=seed))
        if question_answer_pairs(part):
            knowledge = knowledge_memorization(base, part)
            scores.append(score(f"{name}_knowledge_memorization", "percent", better, knowledge, seed=seed))
    if with_wrong := _with_wrong_answers(rows.get("forget", [])):
        right, wrong = truth_losses(base, with_wrong, chat_template=chat_template, batch_size=batch_size)
        ratios = forget_truth_ratio(truth_ratio(right, wrong))
        scores.append(score("forget_truth_ratio", "ratio", True, ratios, seed=seed))
    if rows.get("forget") and rows.get("holdout"):
        scores += membership(base, rows["forget"], rows["holdout"], chat_template=chat_template, batch_size=batch_size)
    return scores


def _with_wrong_answers(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if {"prompt", "paraphrased", "perturbed"} <= row.keys()]
