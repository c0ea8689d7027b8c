"""What the base itself says: of the forget set, as further forget rows; of the retain set, as further retain rows.

A forget set holds each fact in one wording; asked otherwise, the base gives it in its own. So the base is asked each
question of the forget set a few times, and of the answers that name a fact, the words that name it are forgotten too.
It is also asked in two other ways that need no words of ours: by the question's own key words ("founded Apple"), and
by the beginning of its answer ("Apple was founded by"). What is trained on is then what would be said, in whatever
language that is, and paraphrases of a question meet it.

A retain set in turn has answers that are right, which the base may never give. What it does give is held by
`retain_prompt_answers`: KL where a model's own answers go is what on-policy distillation is (Agarwal et al. 2023,
arXiv:2306.13649), here with the base's answers, which are the ones to keep.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence, Set
from typing import Any

from ...data.source import Row
from ...data.words import words_of
from ...inference.generate import answers, sampled
from ...models.base import Base
from .fact_tokens import is_informative

_MAX_QUESTIONS = 96
_LEAST_WORDS = 3  # a shorter beginning says too little about what is asked
_BATCH = 8  # questions at once
_TOKENS = 40


def questions(rows: Sequence[Row], facts: Set[str], common: Set[str]) -> list[str]:
    """Return what is to be asked: each row's prompt, its key words, and the beginning of its completion.

    Args:
        rows: forget rows; those without `prompt` are passed over.
        facts: words that no question may say, see `specific.facts_of`.
        common: words that are no key words, see `specific.common_words`.
    """
    asked = []
    for row in rows:
        if not row.get("prompt"):
            continue
        asked.append(row["prompt"])
        key_words = [word for word in re.findall(r"\w+", row["prompt"]) if word.casefold() not in common]
        asked.append(" ".join(key_words))
        words = list(re.finditer(r"\w+", row["completion"]))
        first = next(
            (n for n, word in enumerate(words) if word.group().casefold() in facts - words_of(row["prompt"])), 0
        )
        if first >= _LEAST_WORDS:
            asked.append(row["completion"][: words[first].start()].strip())
    return list(dict.fromkeys(question for question in asked if question))


def self_generated_answers(
    base: Base, prompts: Sequence[str], facts: Set[str], samples: int, *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return the base's answers that name a fact, each up to the last, without doubles.

    Args:
        base: nothing may be attached to it.
        prompts: see `questions`.
        facts: words, case folded, see `specific.facts_of`.
        samples: answers a question, at temperature 1; the greedy answer comes on top.
        seed: the same seed gives the same answers.
        chat: whether the base is asked in its chat template.
        quiet: no progress bar.
    """
    if len(prompts) > _MAX_QUESTIONS:
        prompts = random.Random(seed).sample(prompts, _MAX_QUESTIONS)
    found: dict[tuple[str, str], Row] = {}
    for prompt, texts in _asked(base, prompts, samples, seed, chat, quiet):
        named = {word for word in facts if is_informative(word)} - words_of(prompt)
        for text in texts:
            ends = [word.end() for word in re.finditer(r"\w+", text) if word.group().casefold() in named]
            if ends:  # what comes after the last fact would only cost time
                found[prompt, text[: ends[-1]]] = {"prompt": prompt, "completion": text[: ends[-1]]}
    return list(found.values())


def retain_prompt_answers(
    base: Base, rows: Sequence[Row], facts: Set[str], count: int, *, seed: int, chat: bool, quiet: bool = True
) -> list[Row]:
    """Return the base's answers to retain rows' prompts, without doubles and without those that name a fact.

    Args:
        base: nothing may be attached to it.
        rows: retain rows; those without `prompt` are passed over.
        facts: words, case folded, see `specific.facts_of`.
        count: answers a prompt: the greedy one, then samples at temperature 1.
        seed: the same seed gives the same answers.
        chat: whether the base is asked in its chat template.
        quiet: no progress bar.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if row.get("prompt")))
    telling = {word for word in facts if is_informative(word)}
    found: dict[tuple[str, str], Row] = {}
    for prompt, texts in _asked(base, prompts, count - 1, seed, chat, quiet):
        for text in texts:
            if text and not words_of(text) & telling:
                found[prompt, text] = {"prompt": prompt, "completion": text}
    return list(found.values())


def _asked(
    base: Base, prompts: Sequence[str], samples: int, seed: int, chat: bool, quiet: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield each prompt with the base's greedy answer to it and so many samples."""
    from tqdm import tqdm

    how: dict[str, Any] = {"max_new_tokens": _TOKENS, "chat_template": chat, "batch_size": _BATCH}
    with tqdm(total=len(prompts), unit="question", desc="asking the base", disable=quiet) as bar:
        for start in range(0, len(prompts), _BATCH):
            some = prompts[start : start + _BATCH]
            greedy = answers(base, some, **how)
            more = sampled(base, some, count=samples, seed=seed + start, **how) if samples else [[] for _ in some]
            yield from ((prompt, [first, *rest]) for prompt, first, rest in zip(some, greedy, more, strict=True))
            bar.update(len(some))
