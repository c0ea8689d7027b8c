"""A recipe's row sets -> the tokenised examples of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from ...data.anchors import anchors
from ...data.rows import read_rows, refuse_overlap
from ...data.source import Row
from ...data.tokenize import Example, by_row, tokenize
from ...errors import DataError
from ...models.base import Base
from ...recipe.schema import DATA_FIELDS, Recipe
from .auto_retain import GeneratedRetain, auto_retain
from .base_answers import questions, retain_prompt_answers, self_generated_answers
from .fact_tokens import common_words, fact_words, mark_facts, mark_forget_rows
from .refusals import refusing

T = TypeVar("T")


@dataclass(frozen=True)
class Sets:
    """Tokenised rows: what is trained on, and the part of the retain set that only the budget looks at."""

    forget: list[Example]
    retain: list[Example]
    held_out: list[Example]
    anchors: list[Example] = field(default_factory=list)  # the package's own rows, trained on like retain rows
    self_generated_answers: list[Example] = field(default_factory=list)  # the base's, forgotten like the forget rows


def read_sets(recipe: Recipe) -> dict[str, list[Row]]:
    """Read all row sets that the recipe names, and refuse those that contradict each other."""
    sources = {name: source for name in DATA_FIELDS if (source := getattr(recipe, name)) not in (None, "auto")}
    rows = {name: read_rows(source, name) for name, source in sources.items()}
    if "forget" not in rows:
        raise DataError("the forget set is missing: expected a file or rows to forget")
    refuse_overlap(rows["forget"], rows.get("retain", []))
    return rows


def make_retain(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe) -> GeneratedRetain:
    """Make the retain set of a recipe that names none, from the row sets that it does name.

    Raises:
        DataError: if nothing is left that shares no name with the forget set.
    """
    never = [row for name in ("probes", "neighbours") for row in rows.get(name, [])]
    made = auto_retain(base, rows["forget"], recipe.seed, never=never, chat_template=recipe.chat_template)
    if not made.rows:
        raise DataError(
            f"no retain set could be made ({made.summary()}): name one with `retain`, or set retain_weight: 0"
        )
    refuse_overlap(rows["forget"], made.rows)
    return made


def build_examples(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe, *, quiet: bool = True) -> Sets:
    """Turn a recipe's rows into what is trained on: facts marked, the base's own answers and anchors beside them."""

    def tokens(rows: Sequence[Row], what: str, closing: bool = True) -> list[Example]:
        return tokenize(
            rows, base.tokenizer, max_length=recipe.max_length, train_on=recipe.train_on,
            chat_template=recipe.chat_template, closing=closing, what=what,
        )  # fmt: skip

    def with_refusals(examples: list[Example], rows: Sequence[Row]) -> list[Example]:
        refusals = getattr(recipe.objective, "refusals", False)  # any objective's, a user's own too
        if refusals is False:
            return examples
        refused = refusing(rows, recipe.seed, refusals if isinstance(refusals, list) else None)
        return [
            replace(example, refusal=tokens([row], "refusal")[0]) if row else example
            for row, windows in zip(refused, by_row(examples), strict=True)
            for example in windows
        ]

    anchor_rows: list[Row] = []
    if recipe.anchor_batch and recipe.retain_weight:
        anchor_rows = anchors(rows["forget"], *(rows.get(name, []) for name in ("retain", "probes", "neighbours")))
    retain_rows = rows.get("retain", [])
    row_windows = by_row(tokens(retain_rows, "retain"))
    pairs, held_out_pairs = split_retain(list(zip(retain_rows, row_windows, strict=True)), recipe)
    retain, held_out = ([e for _, examples in part for e in examples] for part in (pairs, held_out_pairs))
    anchor_examples = tokens(anchor_rows, "anchor")
    stays = [*retain, *held_out, *anchor_examples]
    common = common_words(stays)
    forget = tokens(rows["forget"], "forget", closing=False)
    facts = fact_words(forget, common)
    self_generated: list[Example] = []
    if recipe.own_answers and getattr(recipe.objective, "forget_tokens", "all") == "specific":
        prompts = questions(rows["forget"], facts, common | common_words(stays, of_prompts=True))
        answered = self_generated_answers(
            base, prompts, facts, recipe.own_answers, seed=recipe.seed, chat=recipe.chat_template, quiet=quiet
        )
        self_generated = mark_facts(with_refusals(tokens(answered, "forget", closing=False), answered), facts)
    if recipe.retain_answers and recipe.retain_weight and not recipe.makes_retain:  # those rows are its own already
        answered = retain_prompt_answers(
            base, [row for row, _ in pairs], facts, recipe.retain_answers,
            seed=recipe.seed, chat=recipe.chat_template, quiet=quiet,
        )  # fmt: skip
        retain += tokens(answered, "own answer", closing=False)
    forget = with_refusals(mark_forget_rows(forget, facts), rows["forget"])
    return Sets(forget, retain, held_out, anchor_examples, self_generated)


def split_retain(retain: Sequence[T], recipe: Recipe) -> tuple[list[T], list[T]]:
    """Split the retain set into what is trained on and what only the budget sees.

    Without a budget nothing is held out; neither is it from fewer than four rows, which all are needed.
    """
    if recipe.objective.retain_budget is None or len(retain) < 4:
        return list(retain), []
    count = max(1, round(len(retain) * recipe.held_out))
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held_out = set(order[:count])
    return [e for i, e in enumerate(retain) if i not in held_out], [e for i, e in enumerate(retain) if i in held_out]
