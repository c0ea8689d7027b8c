"""What the full suite has beside the quick one: memorization as in MUSE, membership attacks, the truth ratio.

A base in any state and sets of rows come in; a list of `Score` goes out. What has no rows is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...data.source import Row
from ...errors import DataError
from ...models.base import Base
from ..metrics.membership import membership
from ..metrics.memorization import knowledge_memorization, verbatim_memorization
from ..metrics.truth_ratio import forget_truth_ratio, truth_losses, truth_ratio
from ..score import Score, score
from ..token_scores import questions


def check(rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse rows that would be found unfit only after minutes.

    Raises:
        DataError: if there are held-out rows but no forget rows, or answers for the truth ratio cannot be used.
    """
    if rows.get("holdout") and not rows.get("forget"):
        raise DataError("held-out rows are compared with the forget rows: name these too")
    asked = _with_wrong_answers(rows.get("forget", []))
    for row in asked:
        wrong = row["perturbed"]
        texts = [row["prompt"], row["paraphrased"], *(wrong if isinstance(wrong, list) else [None])]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError("'paraphrased' of a forget row must be a text, 'perturbed' a list of texts")
    counts = {len(row["perturbed"]) for row in asked}
    if len(counts) > 1 or 0 in counts:
        raise DataError(f"the truth ratio needs as many wrong answers for each forget row; found {sorted(counts)}")


def measure(
    base: Base,
    rows: Mapping[str, Sequence[Row]],
    *,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 8,
) -> list[Score]:
    """Measure a base in the state that it is in.

    Verbatim and knowledge memorization ask as MUSE does: plain text, answers of 128 and 32 tokens. Of the six
    membership attacks all run but the one that needs a model that never saw the forget rows.

    Args:
        base: with adapters, or without.
        rows: checked rows by set: `forget` (for the truth ratio with `paraphrased` and `perturbed`), `retain`, and
            `holdout`, rows like the forget rows that the base has never seen.
        seed: of the bootstrap.
        chat_template: see `data.tokenize`.
        batch_size: rows at a time.
    """
    scores = []
    for name in ("forget", "retain"):
        given = rows.get(name, [])
        written = verbatim_memorization(base, given, batch_size=batch_size)
        better = name == "retain"
        if len(written):
            scores.append(score(f"{name}_verbatim_memorization", "percent", better, written, seed=seed))
        if questions(given):
            known = knowledge_memorization(base, given, batch_size=batch_size)
            scores.append(score(f"{name}_knowledge_memorization", "percent", better, known, seed=seed))
    if asked := _with_wrong_answers(rows.get("forget", [])):
        right, wrong = truth_losses(base, asked, chat_template=chat_template, batch_size=batch_size)
        ratios = forget_truth_ratio(truth_ratio(right, wrong))
        scores.append(score("forget_truth_ratio", "ratio", True, ratios, seed=seed))
    if rows.get("forget") and rows.get("holdout"):
        scores += membership(base, rows["forget"], rows["holdout"], chat_template=chat_template, batch_size=batch_size)
    return scores


def _with_wrong_answers(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if {"prompt", "paraphrased", "perturbed"} <= row.keys()]
