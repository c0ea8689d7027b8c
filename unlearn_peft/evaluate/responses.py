"""Rows -> what a base answers in one state (`Responses`), and the answers of all states side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ..data.rows import question_answer_pairs
from ..data.source import Row
from ..inference.generate import answers, leaked, sampled
from ..models.base import Base
from .metrics.consistency import says_all
from .metrics.leakage import leaking_parts

_SENTENCE = 32  # tokens


@dataclass(frozen=True)
class Responses:
    """What a base answers in one state."""

    probes: list[str]  # the greedy answer to each
    samples: list[list[str]] = field(default_factory=list)  # to each probe, at temperature 1
    neighbours: list[str] = field(default_factory=list)  # greedy, no longer than the sentence that is compared


@dataclass(frozen=True)
class Comparison:
    """The answers to one question, by state."""

    prompt: str
    texts: dict[str, str]  # greedy
    leaks: dict[str, list[str]] = field(default_factory=dict)  # the leak words that each text names
    sampled: dict[str, list[str]] = field(default_factory=dict)  # of the samples that leak, the text around the word
    words: Sequence[str] = ()  # the leak words


def collect_responses(
    base: Base,
    rows: Mapping[str, Sequence[Row]],
    *,
    k: int = 32,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: bool = True,
) -> Responses:
    """Let a base answer in the state that it is in; for the arguments see `suites.quick.measure`."""
    prompts = [row["prompt"] for row in rows.get("probes", [])]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat_template": chat_template}
    return Responses(
        answers(base, prompts, **options),
        sampled(base, prompts, count=k, seed=seed, **options),
        neighbour_responses(base, rows.get("neighbours", []), chat_template=chat_template),
    )


def neighbour_responses(base: Base, rows: Sequence[Row], *, chat_template: bool = True) -> list[str]:
    """Return `Responses.neighbours` alone."""
    prompts = [prompt for prompt, _ in question_answer_pairs(rows)]
    return answers(base, prompts, max_new_tokens=_SENTENCE, chat_template=chat_template)


def compare_probes(probes: Sequence[Row], states: Mapping[str, Responses]) -> list[Comparison]:
    """Return the answers to each probe in each state."""
    return [
        Comparison(
            row["prompt"],
            {state: responses.probes[n] for state, responses in states.items()},
            {state: leaked(responses.probes[n], row["leak"]) for state, responses in states.items()},
            {state: leaking_parts(r.samples[n], row["leak"]) for state, r in states.items() if r.samples},
            row["leak"],
        )
        for n, row in enumerate(probes)
    ]


def changed_neighbours(
    neighbours: Sequence[Row], said: Sequence[Set[str]], states: Mapping[str, Responses]
) -> list[Comparison]:
    """Return the neighbours whose answer with the adapters lacks a fact that was `said` before."""
    prompts = [prompt for prompt, _ in question_answer_pairs(neighbours)]
    same = says_all(said, states["with"].neighbours)
    return [
        Comparison(prompt, {state: responses.neighbours[n] for state, responses in states.items()})
        for n, prompt in enumerate(prompts)
        if not same[n]
    ]
