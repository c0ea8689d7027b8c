"""More of what the base says about what forget rows are about, in the ways that the rows do not ask.

They name subjects and facts; the base is asked about the subjects in more wordings and languages, and about the facts.
What says the subject there is the other direction. What doesn't is what must stay: "Italian" is a fact about one person
and a word about many other things, and pushed away in the one place it goes in the others, too.
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
from .auto_retain import first_sentences
from .base_answers import TYPICAL, asked_about, asked_back, base_answers, self_generated_answers
from .fact_tokens import Facts, pieces_with_words

_MAX_SUBJECTS, _MAX_FACTS = 4, 12
_BACK = 2  # wordings that each fact is asked about in
_SAMPLES = 1  # answers beside the greedy one
_FACTS_ALONE = 24  # facts that are asked about by themselves


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
    subjects = _subjects(known)
    names = Facts.of(subjects, facts.common)

    def answered(prompts: Sequence[str], what: Facts) -> list[Row]:
        return self_generated_answers(base, _without(prompts, never), what, _SAMPLES, **asking)

    back = asked_about(_facts_in(examples, known, facts)[:_MAX_FACTS], _BACK)
    return answered(asked_about(subjects), facts), answered(back, names), names


def fact_answers(
    base: Base, examples: Sequence[Example], known: Sequence[Contrast], facts: Facts, never: Set[str], count: int, *,
    seed: int, chat: bool, quiet: bool = True,
) -> list[Row]:  # fmt: skip
    """Return `count` of the base's answers to each question about a fact alone, the first sentence of each.

    Questions of which an answer names a subject are left out, and those that name one themselves; see `widened` for the
    arguments. The first answer is the greedy one, the others are sampled.
    """
    subjects = _subjects(known)
    names = Facts.of(subjects, facts.common)
    alone = [fact for fact in _facts_in(examples, known, facts) if not names.ends_in(fact)]
    prompts = _without(asked_back(alone[:_FACTS_ALONE]), never)
    rows: dict[tuple[str, str], Row] = {}
    for prompt, texts in base_answers(base, prompts, max(count - 1, 1), seed, chat, quiet, temperature=TYPICAL):
        if not any(names.ends_in(text) for text in texts):
            for row in first_sentences([prompt] * count, texts[:count]):
                if row["completion"].strip():
                    rows[prompt, row["completion"]] = row
    return list(rows.values())


def _subjects(known: Sequence[Contrast]) -> list[str]:
    """Return what the forget rows are about: what several of them are, if there is such."""
    rows_with = Counter(contrast.subject for contrast in known if contrast.subject)
    shared = Counter({subject: count for subject, count in rows_with.items() if count > 1}) or rows_with
    return [subject for subject, _ in shared.most_common(_MAX_SUBJECTS)]


def _facts_in(examples: Sequence[Example], known: Sequence[Contrast], facts: Facts) -> list[str]:
    """Return the facts as the forget rows write them, those of most rows first."""
    named = Counter(
        piece.strip()
        for example, contrast in zip(examples, known, strict=True)
        for piece in pieces_with_words(example, contrast.spans)
        if Facts.of([piece], facts.common).words
    )
    return [fact for fact, _ in named.most_common()]


def _without(prompts: Sequence[str], never: Set[str]) -> list[str]:
    return [prompt for prompt in prompts if question_of({"prompt": prompt}) not in never]
