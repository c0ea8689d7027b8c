"""What the base itself answers: to forget prompts, as further forget rows; to retain prompts, as further retain rows.

A forget set holds each fact in one wording; the base has others. So it is asked each question a few times, also by the
question's key words ("founded Apple") and by the beginning of its answer ("Apple was founded by"), in whatever language
the rows are in. Of the answers that name a fact, the words that name it are forgotten too.

The answers of a retain set are right, but the base may never give them. What it does give is held by
`retain_prompt_answers`, as in on-policy distillation (Agarwal et al. 2023, arXiv:2306.13649) with the base as teacher.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Set
from typing import Any

from ...data.source import Row
from ...data.words import word_matches, words_of
from ...inference.generate import answers, sampled
from ...models.base import Base
from .fact_tokens import is_informative

_MAX_QUESTIONS = 96
_MIN_WORDS = 3  # a shorter beginning says too little about what is asked
_BATCH = 8  # questions at once
_TOKENS = 40


def questions(rows: Sequence[Row], facts: Set[str], common: Set[str]) -> list[str]:
    """Return the prompts for `self_generated_answers`: each row's own, its key words, and how its completion begins.

    Key words are those that are not `common`; the beginning ends in front of the first fact, see `fact_words`.
    """
    prompts = []
    for row in rows:
        if not row.get("prompt"):
            continue
        prompts.append(row["prompt"])
        key_words = [word.group() for word in word_matches(row["prompt"]) if word.group().casefold() not in common]
        prompts.append(" ".join(key_words))
        answer, new_facts = list(word_matches(row["completion"])), facts - words_of(row["prompt"])
        first = next((n for n, word in enumerate(answer) if word.group().casefold() in new_facts), 0)
        if first >= _MIN_WORDS:
            prompts.append(row["completion"][: answer[first].start()].strip())
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))


def self_generated_answers(
    base: Base, prompts: Sequence[str], facts: Set[str], samples: int, *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return the base's answers that name a fact, each up to the last fact, without doubles.

    A prompt gets the greedy answer and so many samples, at temperature 1, in the chat template if `chat`. Nothing may
    be attached to the base; the same seed gives the same answers.
    """
    if len(prompts) > _MAX_QUESTIONS:
        prompts = random.Random(seed).sample(prompts, _MAX_QUESTIONS)
    rows: dict[tuple[str, str], Row] = {}
    for prompt, texts in _answers(base, prompts, samples, seed, chat, quiet):
        named = {word for word in facts if is_informative(word)} - words_of(prompt)
        for text in texts:
            ends = [word.end() for word in word_matches(text) if word.group().casefold() in named]
            if ends:  # what comes after the last fact would only cost time
                rows[prompt, text[: ends[-1]]] = {"prompt": prompt, "completion": text[: ends[-1]]}
    return list(rows.values())


def retain_prompt_answers(
    base: Base, rows: Sequence[Row], facts: Set[str], count: int, *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return `count` of the base's answers to each retain prompt, without doubles and those that name a fact.

    The first is the greedy one; see `self_generated_answers`.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if row.get("prompt")))
    informative = {word for word in facts if is_informative(word)}
    answered: dict[tuple[str, str], Row] = {}
    for prompt, texts in _answers(base, prompts, count - 1, seed, chat, quiet):
        for text in texts:
            if text and not words_of(text) & informative:
                answered[prompt, text] = {"prompt": prompt, "completion": text}
    return list(answered.values())


def _answers(
    base: Base, prompts: Sequence[str], samples: int, seed: int, chat: bool, quiet: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield each prompt with the base's greedy answer to it and so many samples."""
    from tqdm import tqdm

    settings: dict[str, Any] = {"max_new_tokens": _TOKENS, "chat_template": chat, "batch_size": _BATCH}
    with tqdm(total=len(prompts), unit="question", desc="generating answers", disable=quiet) as bar:
        for start in range(0, len(prompts), _BATCH):
            chunk = prompts[start : start + _BATCH]
            greedy = answers(base, chunk, **settings)
            more: list[list[str]] = [[] for _ in chunk]
            if samples:
                more = sampled(base, chunk, count=samples, seed=seed + start, **settings)
            yield from ((prompt, [first, *rest]) for prompt, first, rest in zip(chunk, greedy, more, strict=True))
            bar.update(len(chunk))
