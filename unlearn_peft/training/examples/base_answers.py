"""What the base itself answers: to forget prompts, as further forget rows; to retain prompts, as further retain rows.

A forget set holds each fact in one wording; the base has others. So it is asked each question a few times, also by the
subject alone ("Apple"), the question's key words ("founded Apple") and the beginning of its answer ("Apple was founded
by"), and questions of its own once: it goes on with lists of the user's. Plain text is continued from its beginning and
from places inside. Of the answers that name a fact, the words that name it are forgotten too.

The answers of a retain set are right, but the base may never give them. What it does give is held by
`retain_prompt_answers`, as in on-policy distillation (Agarwal et al. 2023, arXiv:2306.13649) with the base as teacher.
So is what it says of a made-up name in the subject's place: `stand_in_answers` keep its language, whichever that is.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from ...data.rows import question_texts, single_question
from ...data.source import Row
from ...data.windows import prefixes
from ...data.words import word_matches
from ...inference.contrast import Contrast
from ...inference.generate import answers, continued_lists, sampled
from ...inference.stand_ins import made_up, replaced_row
from ...models.base import Base
from ...models.layers import known_tokens
from .fact_tokens import Facts

logger = logging.getLogger(__name__)
_SUBJECT_PROMPTS = Path(__file__).parent / "subject_prompts.txt"
_FACT_PROMPTS = Path(__file__).parent / "fact_prompts.txt"
_MAX_ANSWERS = 384  # in all; each row is asked at least once
_MIN_STAND_INS, _MAX_STAND_INS = 8, 64
_CONTINUED, TYPICAL = 4, 0.7  # times, of few; and the temperature: at 1 a small base leaves the language
_LISTS, _LISTED, _LIST_ENDS = 8, 8, 8  # of questions: lists, questions in each, and times each is continued
MAX_CHARACTERS = 160  # of a question that is asked in other ways, too
_MIN_WORDS = 3  # a shorter beginning says too little about what is asked
_AT_ONCE = 64  # questions, and then progress is shown
_TOKENS = 40
_OPENING = 6  # tokens of plain text that the base goes on with in its own way
_PREFIX, _PLACES = 24, 32  # tokens of plain text that are continued, and from how many places of each text


def questions(rows: Sequence[Row], facts: Facts, common: Set[str], subjects: Sequence[str] = ()) -> list[str]:
    """Return the prompts for `self_generated_answers`: rows' own, subjects, rows' key words and answers' beginnings.

    Key words are those that are not `common`; the beginning ends in front of the first word that names a fact. Where
    there are many rows, only their own questions are asked.
    """
    own, more = [], []
    for row in rows:
        for prompt in question_texts(row):
            own.append(prompt)
            more.append(" ".join(m.group() for m in word_matches(prompt) if m.group().casefold() not in common))
        if row.get("prompt"):
            said = {match.group().casefold() for match in word_matches(row["prompt"])}
            ends = set(facts.ends_in(row["completion"]))
            answer = list(word_matches(row["completion"]))
            new = (n for n, m in enumerate(answer) if m.end() in ends and m.group().casefold() not in said)
            first = next(new, 0)
            if first >= _MIN_WORDS:
                more.append(row["completion"][: answer[first].start()].strip())
    different = list(dict.fromkeys(prompt for prompt in (*own, *subjects, *more) if prompt.strip()))
    return different[: max(_MAX_ANSWERS, len(own))]


def asked_about(names: Sequence[str], wordings: int | None = None) -> list[str]:
    """Return prompts that ask about names in several wordings, the last of them in other languages."""
    return _filled(_SUBJECT_PROMPTS, names, wordings)


def asked_back(facts: Sequence[str], wordings: int | None = None) -> list[str]:
    """Return prompts that ask whom or what facts tell, the shortest way first."""
    return _filled(_FACT_PROMPTS, facts, wordings)


def _filled(forms: Path, names: Sequence[str], wordings: int | None) -> list[str]:
    lines = [line for line in forms.read_text(encoding="utf-8").splitlines() if line]
    return [line.format(name=name) for line in lines[:wordings] for name in names]


def more_questions(base: Base, rows: Sequence[Row], *, seed: int) -> list[str]:
    """Return questions that the base lists after forget questions: like them, in their language and on their topic."""
    asked = [question for row in rows if (question := single_question(row)) and len(question) <= MAX_CHARACTERS]
    asked = list(dict.fromkeys(" ".join(question.split()) for question in asked))
    if not asked:
        return []
    draw, lists = random.Random(seed), list[list[str]]()
    for _ in range(_LISTS):
        lists.append(draw.sample(asked, min(len(asked), _LISTED)))
    continued = continued_lists(base, lists, count=_LIST_ENDS, max_new_tokens=_TOKENS, seed=seed)
    found = dict.fromkeys(entry for samples in continued for entries in samples for entry in entries)
    return [question for question in found if any(word_matches(question)) and question not in asked]


def self_generated_answers(
    base: Base, prompts: Sequence[str], facts: Facts, samples: int, *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return the base's answers that name a fact, each up to the last fact, without doubles.

    A prompt gets the greedy answer and so many samples, at temperature 1, in the chat template if `chat`; fewer where
    there are many prompts, and the log says how many. Nothing may be attached to the base; the same seed gives the same
    answers.
    """
    rows: dict[tuple[str, str], Row] = {}
    for prompt, texts in base_answers(base, prompts, _affordable(prompts, samples), seed, chat, quiet):
        said = {match.group().casefold() for match in word_matches(prompt)}
        for text in texts:
            if ends := facts.ends_in(text, said):  # what comes after the last fact would only cost time
                rows[prompt, text[: ends[-1]]] = {"prompt": prompt, "completion": text[: ends[-1]]}
    return list(rows.values())


def continued_texts(
    base: Base, rows: Sequence[Row], facts: Facts, samples: int, *, seed: int, quiet: bool = True
) -> list[Row]:
    """Return plain texts as the base goes on with them, from several places, where it names a fact; without doubles."""
    beginnings = [
        piece
        for row in rows
        if "text" in row
        for piece, _ in prefixes(row["text"], base.tokenizer, count=_PLACES, tokens=_PREFIX)
    ]
    beginnings = list(dict.fromkeys(beginnings))
    found: dict[str, Row] = {}
    for prefix, texts in base_answers(base, beginnings, _affordable(beginnings, samples), seed, False, quiet):
        for text in texts:
            if ends := facts.ends_in(text):
                found[prefix + text[: ends[-1]]] = {"text": prefix + text[: ends[-1]]}
    return list(found.values())


def _affordable(prompts: Sequence[str], samples: int) -> int:
    """Return how many samples each prompt gets: fewer, which is told, where there are many."""
    fewer = min(samples, max(_MAX_ANSWERS // max(len(prompts), 1) - 1, 0))
    if fewer < samples:
        logger.info("%d questions: each is asked %d time(s) instead of %d", len(prompts), fewer + 1, samples + 1)
    return fewer


def retain_prompt_answers(
    base: Base, rows: Sequence[Row], facts: Facts, count: int, *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return `count` of the base's answers to each retain prompt, without doubles and those that name a fact.

    The first is the greedy one; see `self_generated_answers`.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if row.get("prompt")))
    answered: dict[tuple[str, str], Row] = {}
    for prompt, texts in base_answers(base, prompts, count - 1, seed, chat, quiet):
        for text in texts:
            if text.strip() and not facts.ends_in(text):
                answered[prompt, text] = {"prompt": prompt, "completion": text}
    return list(answered.values())


def stand_in_answers(
    base: Base, rows: Sequence[Row], known: Sequence[Contrast], *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return the base's greedy answers to forget questions that ask for a made-up name.

    They are in the language and the form of the forget rows. A subject that several rows share is made up in all: with
    "the shape of" alone made up, "What is the shape of DNA?" still asks for its facts. Few rows are asked with several
    names. How the base goes on with plain texts from several places, and with these questions as plain text, comes
    after them, sampled.
    """
    rows_with = Counter(contrast.subject for contrast in known if contrast.subject)
    prompts = []
    for k in range(max(1, -(-_MIN_STAND_INS // len(rows)))):
        shared = {subject: made_up(subject, f"{k}") for subject, count in rows_with.items() if count > 1}
        for n, (row, contrast) in enumerate(zip(rows, known, strict=True)):
            own = made_up(contrast.subject, f"{n} {k + 1}") if k and contrast.subject else contrast.stand_in
            others = {**shared, contrast.subject: own} if contrast.subject else shared
            if others and (changed := replaced_row(row, others)) != row:
                prompts += question_texts(changed)
    prompts = _some(prompts, seed)
    greedy = base_answers(base, prompts, 0, seed, chat, quiet)
    made = [{"prompt": prompt, "completion": text} for prompt, (text,) in greedy if text.strip()]
    texts = [row["text"] for row in rows if "text" in row]
    places = max(1, _PLACES // max(len(texts), 1))
    starts = [start for text in texts for start, _ in prefixes(text, base.tokenizer, count=places, tokens=_OPENING)]
    for openings in (_some(starts, seed), _some(prompts, seed)):
        times = max(1, min(_CONTINUED, _MAX_STAND_INS // max(len(openings), 1)))
        for opening, (_, *more) in base_answers(base, openings, times, seed, False, quiet, temperature=TYPICAL):
            made += [{"text": opening + text} for text in more if text.strip()]
    return made


def _some(prompts: Sequence[str], seed: int) -> list[str]:
    """Return the prompts once each, or a sample of many."""
    different = list(dict.fromkeys(prompts))
    return random.Random(seed).sample(different, _MAX_STAND_INS) if len(different) > _MAX_STAND_INS else different


def base_answers(
    base: Base, prompts: Sequence[str], samples: int, seed: int, chat: bool, quiet: bool, temperature: float = 1.0
) -> Iterator[tuple[str, list[str]]]:
    """Yield each prompt with the base's greedy answer to it and so many samples.

    An answer that reads back as tokens that the base has no embedding for is empty: it cannot be trained on.
    """
    from tqdm import tqdm

    known = known_tokens(base.model)

    def readable(text: str) -> str:
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"] if len(base.tokenizer) > known else []
        return text if max(ids, default=0) < known else ""

    settings: dict[str, Any] = {"max_new_tokens": _TOKENS, "chat_template": chat}
    with tqdm(total=len(prompts), unit="question", desc="generating answers", disable=quiet or not prompts) as bar:
        for start in range(0, len(prompts), _AT_ONCE):
            chunk = prompts[start : start + _AT_ONCE]
            greedy = answers(base, chunk, **settings)
            more: list[list[str]] = [[] for _ in chunk]
            if samples:
                more = sampled(base, chunk, count=samples, temperature=temperature, seed=seed + start, **settings)
            for prompt, first, rest in zip(chunk, greedy, more, strict=True):
                yield prompt, [readable(text) for text in (first, *rest)]
            bar.update(len(chunk))
