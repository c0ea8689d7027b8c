"""What a base says, asked once in each state: figures are made of it, and people read it.

A base in the state that it is in and sets of rows come in; `Responses` goes out, and of several states `Comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.source import Row
from ..inference.generate import answers, leaked, sampled
from ..models.base import Base
from .metrics.consistency import same_entities
from .metrics.leakage import leaking_parts
from .token_scores import questions

_SENTENCE = 32  # tokens


@dataclass(frozen=True)
class Responses:
    """What a base says in one state.

    Attributes:
        probes: the greedy answer to each probe.
        samples: the answers sampled for each probe, at temperature 1.
        neighbours: the greedy answers to the neighbours' questions, no longer than the sentence that is compared.
    """

    probes: list[str]
    samples: list[list[str]]
    neighbours: list[str]


@dataclass(frozen=True)
class Comparison:
    """The answers to one question, by state.

    Attributes:
        prompt: the question.
        texts: the greedy answers.
        leaks: the leak words that each of these names; it, like what follows, is empty for a question without any.
        sampled: of the sampled answers, what stands around the leak word in each that names one.
        words: the leak words.
    """

    prompt: str
    texts: dict[str, str]
    leaks: dict[str, list[str]] = field(default_factory=dict)
    sampled: dict[str, list[str]] = field(default_factory=dict)
    words: Sequence[str] = ()


def collect_responses(
    base: Base,
    rows: Mapping[str, Sequence[Row]],
    *,
    k: int = 32,
    max_new_tokens: int = 64,
    seed: int = 0,
    chat_template: bool = True,
    batch_size: int = 8,
) -> Responses:
    """Ask a base in the state that it is in; the arguments are those of `suite.measure`."""
    prompts = [row["prompt"] for row in rows.get("probes", [])]
    how: dict[str, Any] = {"chat_template": chat_template, "batch_size": batch_size}
    return Responses(
        answers(base, prompts, max_new_tokens=max_new_tokens, **how),
        sampled(base, prompts, count=k, max_new_tokens=max_new_tokens, seed=seed, chat_template=chat_template),
        neighbour_responses(base, rows.get("neighbours", []), **how),
    )


def neighbour_responses(
    base: Base, rows: Sequence[Row], *, chat_template: bool = True, batch_size: int = 8
) -> list[str]:
    """Return `Responses.neighbours` alone."""
    prompts = [prompt for prompt, _ in questions(rows)]
    return answers(base, prompts, max_new_tokens=_SENTENCE, chat_template=chat_template, batch_size=batch_size)


def compare_probes(probes: Sequence[Row], said: Mapping[str, Responses]) -> list[Comparison]:
    """Return for each probe what was said in each state."""
    return [
        Comparison(
            row["prompt"],
            {state: one.probes[n] for state, one in said.items()},
            {state: leaked(one.probes[n], row["leak"]) for state, one in said.items()},
            {state: leaking_parts(one.samples[n], row["leak"]) for state, one in said.items()},
            row["leak"],
        )
        for n, row in enumerate(probes)
    ]


def changed_neighbours(neighbours: Sequence[Row], said: Mapping[str, Responses]) -> list[Comparison]:
    """Return those neighbours whose answer with the adapters names something else than before."""
    prompts = [prompt for prompt, _ in questions(neighbours)]
    same = same_entities(prompts, said["before"].neighbours, said["with"].neighbours)
    return [
        Comparison(prompt, {state: one.neighbours[n] for state, one in said.items()})
        for n, prompt in enumerate(prompts)
        if not same[n]
    ]
