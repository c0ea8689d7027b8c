"""A recipe's row sets -> the tokenized examples of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...data.anchors import anchors
from ...data.rows import read_rows, refuse_overlap
from ...data.source import Row
from ...data.tokenize import Example, tokenize
from ...errors import DataError
from ...files.paths import digest_key
from ...models.base import Base
from ...recipe.schema import DATA_FIELDS, Recipe
from ..schedule import T
from .auto_retain import Made, auto_retain
from .base_answers import questions, retain_prompt_answers, self_generated_answers
from .fact_tokens import common_words, fact_words, mark_facts, mark_forget_rows
from .refusals import refusing


def read_sets(recipe: Recipe) -> dict[str, list[Row]]:
    """Read all row sets that the recipe names, and refuse those that contradict each other."""
    named = {name: source for name in DATA_FIELDS if (source := getattr(recipe, name)) not in (None, "auto")}
    rows = {name: read_rows(source, name) for name, source in named.items()}
    if "forget" not in rows:
        raise DataError("the forget set is missing: expected a file or rows to forget")
    refuse_overlap(rows["forget"], rows.get("retain", []))
    return rows


def make_retain(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe) -> Made:
    """Make the retain set of a recipe that names none, from the row sets that it does name.

    Raises:
        DataError: if nothing is left that shares no name with the forget set.
    """
    never = [row for name in ("probes", "neighbours") for row in rows.get(name, [])]
    made = auto_retain(
        base, rows["forget"], recipe.seed, key=digest_key(), never=never, chat_template=recipe.chat_template
    )
    if not made.rows:
        raise DataError(f"no retain set could be made ({made.line()}): name one with `retain`, or set retain_weight: 0")
    refuse_overlap(rows["forget"], made.rows)
    return made


def tokenized(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe, *, quiet: bool = True) -> Sets:
    """Turn a recipe's rows into what is trained on: facts marked, the base's own answers and anchors beside them."""

    def tokens(rows: Sequence[Row], what: str) -> list[Example]:
        return tokenize(
            rows, base.tokenizer, max_length=recipe.max_length, train_on=recipe.train_on,
            chat_template=recipe.chat_template, closing=what not in ("forget", "own answer"), what=what,
        )  # fmt: skip

    def with_refusals(examples: list[Example], shown: Sequence[Row]) -> list[Example]:
        wanted = getattr(recipe.objective, "refusals", False)  # any objective's, a user's own too
        if wanted is False:
            return examples
        refused = refusing(shown, recipe.seed, wanted if isinstance(wanted, list) else None)
        return [
            replace(example, refusal=tokens([row], "refusal")[0]) if row else example
            for example, row in zip(examples, refused, strict=True)
        ]

    wide: list[Row] = []
    if recipe.anchor_batch and recipe.retain_weight:
        wide = anchors(rows["forget"], *(rows.get(name, []) for name in ("retain", "probes", "neighbours")))
    kept = rows.get("retain", [])
    pairs, held_out_pairs = split_retain(list(zip(kept, tokens(kept, "retain"), strict=True)), recipe)
    retain, held_out = [example for _, example in pairs], [example for _, example in held_out_pairs]
    held = tokens(wide, "anchor")
    common = common_words([*retain, *held_out, *held])
    bare = tokens(rows["forget"], "forget")
    facts = fact_words(bare, common)
    forget = mark_forget_rows(bare, facts)
    own: list[Example] = []
    if recipe.own_answers and getattr(recipe.objective, "forget_tokens", "all") == "specific":
        asked = questions(rows["forget"], facts, common | common_words([*retain, *held_out, *held], of_prompts=True))
        said = self_generated_answers(
            base, asked, facts, recipe.own_answers, seed=recipe.seed, chat=recipe.chat_template, quiet=quiet
        )
        own = mark_facts(with_refusals(tokens(said, "forget"), said), facts)
    if recipe.retain_answers and recipe.retain_weight and not recipe.makes_retain:  # those rows are its own already
        said = retain_prompt_answers(
            base, [row for row, _ in pairs], facts, recipe.retain_answers,
            seed=recipe.seed, chat=recipe.chat_template, quiet=quiet,
        )  # fmt: skip
        retain += tokens(said, "own answer")
    return Sets(with_refusals(forget, rows["forget"]), retain, held_out, held, own)


@dataclass(frozen=True)
class Sets:
    """Tokenised rows: what is trained on, and the part of the retain set that only the budget looks at."""

    forget: list[Example]
    retain: list[Example]
    held_out: list[Example]
    anchors: list[Example] = field(default_factory=list)  # the package's own rows, trained on like retain rows
    self_generated_answers: list[Example] = field(default_factory=list)  # the base's, forgotten like the forget rows


def split_retain(retain: Sequence[T], recipe: Recipe) -> tuple[list[T], list[T]]:
    """Split the retain set into what is trained on and what only the budget sees.

    Without a budget nothing is held out; neither is it from fewer than four rows, which all are needed.
    """
    if recipe.objective.retain_budget is None or len(retain) < 4:
        return list(retain), []
    count = max(1, round(len(retain) * recipe.held_out))
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held = set(order[:count])
    return [e for i, e in enumerate(retain) if i not in held], [e for i, e in enumerate(retain) if i in held]
