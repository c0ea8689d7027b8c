"""Forget rows in other forms than the user's: every form of question about their subjects, and back from their facts.

"Who wrote Harry Potter?" alone is forgotten in the direction in which it asks. So the base is also asked about each
subject in the forms of `subject_prompts.txt`, in several languages, and about each fact in turn: what it answers that
names a fact of the rows is forgotten too, and of the answers about a fact those that name the subject ("Who is J.K.
Rowling?").
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.source import Row
from ...data.words import said
from ...models.base import Base
from .base_answers import self_generated_answers
from .fact_tokens import Facts, pieces_with_words

if TYPE_CHECKING:
    from .build import Known

FORMS = [
    line for line in (Path(__file__).parent / "subject_prompts.txt").read_text(encoding="utf-8").splitlines() if line
]
BACK = 2  # forms that each fact is asked about in
_MAX_SUBJECTS, _MAX_FACTS = 4, 16  # the most frequent ones
_SHARE = 0.1  # of the rows with a subject are about one that is asked in all forms


def widened(
    base: Base, known: Known, *, samples: int, seed: int, chat: bool, quiet: bool
) -> tuple[list[Row], list[Row], Facts]:
    """Return what the base answers about the subjects and names a fact, about the facts and names a subject, and these.

    Nothing may be attached to the base; the same arguments give the same rows.
    """
    options: dict[str, Any] = {"seed": seed, "chat": chat, "quiet": quiet}
    subjects = _most(Counter(contrast.subject for contrast in known.rows if contrast.spans and contrast.subject))
    about = [form.format(name=subject) for subject in subjects for form in FORMS]
    forward = self_generated_answers(base, about, known.facts, samples, **options)
    pieces: Counter[str] = Counter()
    for example in {example.row: example for example in known.examples}.values():
        contrast = known.rows[example.row - 1]
        for piece in {piece.strip() for piece in pieces_with_words(example, contrast.spans)}:
            if Facts.of([piece], known.facts.common).words and not said(piece, subjects):
                pieces[piece] += 1
    names = Facts.of(subjects, known.facts.common)
    back = [form.format(name=fact) for fact, _ in pieces.most_common(_MAX_FACTS) for form in FORMS[:BACK]]
    return forward, self_generated_answers(base, back, names, samples, **options), names


def _most(subjects: Counter[str]) -> list[str]:
    least = _SHARE * subjects.total()
    return [subject for subject, count in subjects.most_common(_MAX_SUBJECTS) if count >= least]
