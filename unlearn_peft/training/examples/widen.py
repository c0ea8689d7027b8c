"""More of what the base says about what hand-written forget rows are about, in the ways that the rows do not ask.

They name subjects and facts; the base is asked about the subjects in more wordings and languages, and about the facts:
what says the subject there is the other direction. `unlearn-peft forget NAME` has such rows already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from ...data.rows import question_of
from ...data.source import Row
from ...data.tokenize import Example
from ...inference.contrast import Contrast
from ...models.base import Base
from .base_answers import asked_about, self_generated_answers
from .fact_tokens import Facts, pieces_with_words

_MAX_SUBJECTS, _MAX_FACTS = 4, 12
_BACK = 2  # wordings that each fact is asked about in
_SAMPLES = 1  # answers beside the greedy one


def widened(
    base: Base, examples: Sequence[Example], known: Sequence[Contrast], facts: Facts, never: Set[str], **asking: Any
) -> tuple[list[Row], list[Row], Facts]:
    """Return the base's answers about subjects that name a fact, those about facts that name a subject, and its name.

    Args:
        base: nothing may be attached to it.
        examples: the forget rows, whole.
        known: what the base knows of each.
        facts: what names their facts.
        never: what probes, neighbours and retain rows ask, as `question_of` has it: it is not asked.
        asking: as for `self_generated_answers`.
    """
    rows_with = Counter(contrast.subject for contrast in known if contrast.subject)
    shared = Counter({subject: count for subject, count in rows_with.items() if count > 1}) or rows_with
    subjects = [subject for subject, _ in shared.most_common(_MAX_SUBJECTS)]
    named = Counter(
        piece.strip()
        for example, contrast in zip(examples, known, strict=True)
        for piece in pieces_with_words(example, contrast.spans)
        if Facts.of([piece], facts.common).words
    )
    names = Facts.of(subjects, facts.common)

    def answered(prompts: Sequence[str], what: Facts) -> list[Row]:
        asked = [prompt for prompt in prompts if question_of({"prompt": prompt}) not in never]
        return self_generated_answers(base, asked, what, _SAMPLES, **asking)

    back = asked_about([fact for fact, _ in named.most_common(_MAX_FACTS)], _BACK)
    return answered(asked_about(subjects), facts), answered(back, names), names
