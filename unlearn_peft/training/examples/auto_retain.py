"""`retain: auto`: a retain set that the base writes itself, for users who have none.

The base, forget rows and what the base knows of them come in; rows of `prompt` and the base's own `completion` go out.
The answers need not be true: KL to the base keeps whatever it says. Two kinds of prompt:

- broad: `broad_prompts.txt` (how-to, sums, code, writing, a few other languages), which the anchors do not cover. Where
  a plain text is forgotten, these answers come as plain texts too: in a chat alone they hold nothing outside of it.
- near: the forget questions, asked of others of their subjects' kind (`others.py`), and other questions on their topic,
  which the base makes up: it goes on with a list of forget questions.

There is no parser: the base tells what a row's subject is (see `inference/contrast.py`). Where no question names one
there are no near rows, and `GeneratedRetain.summary` says so. Not all of them make sense (not every question can be
asked of others): review them with `unlearn-peft retain`, and add your own.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.anchors import anchors
from ...data.rows import question_of, single_question, texts_of
from ...data.source import Row
from ...inference.contrast import Contrast
from ...inference.generate import answers
from ...inference.stand_ins import replaced_row
from ...models.base import Base
from .base_answers import MAX_CHARACTERS
from .fact_tokens import Facts, common_words
from .others import others_of

_PROMPTS = Path(__file__).parent / "broad_prompts.txt"
_MAX_ASKED = 16  # forget questions that are asked of others
_MAX_NEAR = 96
_TOKENS = 32
_SENTENCE_END = re.compile(r"(?<!\b\w)(?<!\b\d\d)[.!?]+(?=\s|$)|[。！？]")  # not the dots of "1.", "12." and "J."
_MIN_SENTENCE = 24  # characters


@dataclass(frozen=True)
class GeneratedRetain:
    """The rows, broad ones first, how many there are of both kinds, and how many were left out, by reason."""

    rows: list[Row]
    broad: int
    near: int
    left_out: dict[str, int]

    def summary(self) -> str:
        """Say in one line what was made."""
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
        text = f"retain: auto: {self.broad} broad and {self.near} neighbour rows, answered by the base"
        text += f" (left out: {reasons})" if reasons else ""
        return text if self.near else text + ". No neighbours could be made: name a retain set of your own if you can"


def auto_retain(
    base: Base, forget: Sequence[Row], known: Sequence[Contrast], facts: Facts, seed: int, *,
    beside: Sequence[str] = (), never: Sequence[Row] = (), chat_template: bool = True,
) -> GeneratedRetain:  # fmt: skip
    """Make a retain set from the base's own answers, without rows that `never` may be trained on (probes, neighbours).

    Nothing may be attached to the base; the same arguments give the same rows. They are not cached on disk: the words
    around a subject ("Who wrote ...") tell what kind of question is forgotten.
    """

    def answer(prompts: Sequence[str]) -> list[Row]:
        texts = answers(base, prompts, max_new_tokens=_TOKENS, chat_template=chat_template, strip=False)
        return first_sentences(prompts, texts)

    broad = answer([line for line in _PROMPTS.read_text(encoding="utf-8").splitlines() if line])
    general = [*broad, *anchors([])]
    common = common_words([" ".join(row.values()) for row in general])
    names = facts.joined(Facts.of([contrast.subject for contrast in known], common))
    near: dict[str, str] = {}  # by what they ask
    left_out: Counter[str] = Counter()
    seen = {question_of(row) for row in (*forget, *general)}
    asked: dict[str, str] = {}  # forget questions and their subjects
    for row, contrast in zip(forget, known, strict=True):
        question = single_question(row)
        if contrast.subject and contrast.subject in question and len(question) <= MAX_CHARACTERS:
            asked.setdefault(question, contrast.subject)
    if len(asked) > _MAX_ASKED:
        left_out["questions beyond the limit"] = len(asked) - _MAX_ASKED
        asked = dict(random.Random(seed).sample(list(asked.items()), _MAX_ASKED))
    others = {subject: others_of(base, subject, names) for subject in dict.fromkeys(asked.values())}
    for asking, subject in asked.items():
        for other in others[subject]:
            prompt = replaced_row({"prompt": asking}, {subject: other})["prompt"]
            question = question_of({"prompt": prompt})
            if names.ends_in(prompt):
                left_out["that name what is to be forgotten"] += 1
            elif question not in seen:
                near.setdefault(question, prompt)
    for prompt in beside:
        if (question := question_of({"prompt": prompt})) not in seen and not names.ends_in(prompt):
            near.setdefault(question, prompt)
    chosen = list(near.values())
    if len(chosen) > _MAX_NEAR:
        chosen = random.Random(seed).sample(chosen, _MAX_NEAR)
    forgotten = {text.casefold().strip() for row in forget for text in texts_of(row)}
    excluded = {question_of(row) for row in never}

    def select(rows: Sequence[Row]) -> list[Row]:
        selected = []
        for row in rows:
            same_text = any(text.casefold().strip() in forgotten for text in row.values())
            if not row["completion"]:
                left_out["without an answer"] += 1
            elif same_text or names.ends_in(" ".join(row.values())):
                left_out["that name what is to be forgotten"] += 1
            elif question_of(row) in excluded:
                left_out["asked by probes or neighbours"] += 1
            else:
                selected.append(row)
        return selected

    broad, neighbours = select(broad), select(answer(chosen))
    if any("text" in row for row in forget):
        broad += [{"text": row["completion"].strip()} for row in broad]
    return GeneratedRetain([*broad, *neighbours], len(broad), len(neighbours), dict(left_out))


def first_sentences(prompts: Sequence[str], texts: Sequence[str]) -> list[Row]:
    """Pair prompts with the first sentence of each answer; white space in front of an answer stays."""
    rows: list[Row] = []
    for prompt, text in zip(prompts, texts, strict=True):
        end = next((m.end() for m in _SENTENCE_END.finditer(text) if m.end() >= _MIN_SENTENCE), len(text))
        rows.append({"prompt": prompt, "completion": text[:end].rstrip()})
    return rows
