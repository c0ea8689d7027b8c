"""A recipe's row sets -> the tokenised examples of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...adapters.card import row_numbers
from ...data.anchors import anchors
from ...data.rows import answer_texts, question_of, question_texts, read_rows, refuse_overlap, texts_of
from ...data.source import Row
from ...data.tokenize import Example, by_row, tokenize, windows
from ...errors import DataError
from ...inference.contrast import Contrast, answer_words, contrasts, said_anyway
from ...models.base import Base
from ...models.layers import check_known
from ...recipe.objectives import refusals_of
from ...recipe.schema import DATA_FIELDS, Recipe
from .auto_retain import GeneratedRetain, auto_retain
from .base_answers import (
    continued_texts,
    more_questions,
    questions,
    retain_prompt_answers,
    self_generated_answers,
    stand_in_answers,
)
from .fact_tokens import Facts, common_words, find_facts, mark_facts, mark_unexpected
from .refusals import refusing
from .widen import fact_answers, widened

logger = logging.getLogger(__name__)
_TEXT_WINDOW = 128  # tokens of plain text at once: a step is no longer than with rows of questions
_MIN_TEXT = 24  # characters of what the base goes on with, up to the first fact
_MAX_LISTED = 32  # of the questions that the base made up, of either kind


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


@dataclass(frozen=True)
class Known:
    """What the base knows of the forget rows: of each row, and the words that name the facts of all."""

    rows: list[Contrast]
    facts: Facts
    examples: list[Example]  # the forget rows, whole
    stand_ins: list[Row]  # what it says of made-up names instead, without the rows that name a fact
    about: list[str]  # more questions like theirs, which the base made up: those that name a subject or a fact,
    beside: list[str]  # and those that name none


def find_known(rows: Mapping[str, list[Row]], base: Base, recipe: Recipe, *, quiet: bool = True) -> Known:
    """Ask the base which words of the forget rows carry facts; nothing may be attached to it."""
    forget = rows["forget"]
    options: dict[str, Any] = {"chat_template": recipe.chat_template}
    found = contrasts(base, forget, max_length=recipe.max_length, quiet=quiet, **options)
    made = stand_in_answers(base, forget, found, seed=recipe.seed, chat=recipe.chat_template, quiet=quiet)
    options |= {"train_on": recipe.train_on}
    examples = tokenize(forget, base.tokenizer, max_length=None, closing=False, what="forget", **options)
    words = {example.text[a:b].casefold() for example in examples for a, b in answer_words(example)}
    anyway = said_anyway(base, made, words, chat_template=recipe.chat_template)
    facts = find_facts(examples, found, [*rows.get("retain", []), *anchors([])], anyway)
    names = facts.joined(Facts.of([contrast.subject for contrast in found], facts.common))
    never = _asked_elsewhere(rows)
    asks = recipe.own_answers or recipe.makes_retain
    listed = more_questions(base, forget, seed=recipe.seed) if asks else []
    listed = [question for question in listed if question_of({"prompt": question}) not in never]
    about, beside = ([q for q in listed if bool(names.ends_in(q)) == naming] for naming in (True, False))
    if any("text" in row for row in forget):  # most of what it goes on with names a fact sooner or later
        cut = [{"text": facts.before(row["text"])} if "text" in row else row for row in made]
        made = [row for row in cut if "prompt" in row or len(row["text"]) >= _MIN_TEXT]
    stand_ins = [row for row in made if not any(map(facts.ends_in, answer_texts(row)))]
    return Known(found, facts, examples, stand_ins, about[:_MAX_LISTED], beside[:_MAX_LISTED])


def _asked_elsewhere(rows: Mapping[str, list[Row]]) -> set[str]:
    """Return what retain rows, probes and neighbours ask: the base is not asked it to forget the answer."""
    return {question_of(row) for name in ("retain", "probes", "neighbours") for row in rows.get(name, [])}


def make_retain(
    rows: Mapping[str, list[Row]], base: Base, recipe: Recipe, known: Known | None = None
) -> GeneratedRetain:
    """Make the retain set of a recipe that names none, from the row sets that it does name.

    Raises:
        DataError: if nothing is left that shares no name with the forget set.
    """
    known = known or find_known(rows, base, recipe)
    never = [row for name in ("probes", "neighbours") for row in rows.get(name, [])]
    made = auto_retain(
        base,
        rows["forget"],
        known.rows,
        known.facts,
        recipe.seed,
        beside=known.beside,
        never=never,
        chat_template=recipe.chat_template,
    )
    if not made.rows:
        raise DataError(
            f"no retain set could be made ({made.summary()}): name one with `retain`, or set retain_weight: 0"
        )
    refuse_overlap(rows["forget"], made.rows)
    return made


def build_examples(
    rows: Mapping[str, list[Row]], base: Base, recipe: Recipe, known: Known | None = None, *, quiet: bool = True
) -> Sets:
    """Turn a recipe's rows into what is trained on: facts marked, the base's own answers and anchors beside them.

    Raises:
        DataError: if only fact tokens are pushed away, and no row has any that may be.
    """

    def tokens(rows: Sequence[Row], what: str, closing: bool = True) -> list[Example]:
        examples = tokenize(
            rows, base.tokenizer, max_length=base.window(recipe.max_length), train_on=recipe.train_on,
            chat_template=recipe.chat_template, closing=closing, what=what,
        )  # fmt: skip
        for example in examples:
            check_known(base.model, example.ids, f"row {example.row} of the {what} set")
        return examples

    def with_refusals(examples: list[Example], rows: Sequence[Row]) -> list[Example]:
        if (refusals := refusals_of(recipe.objective)) is None:
            return examples
        refused = refusing(rows, recipe.seed, refusals)
        return [
            replace(example, refusal=tokens([row], "refusal")[0]) if row else example
            for row, windows in zip(refused, by_row(examples), strict=True)
            for example in windows
        ]

    known = known or find_known(rows, base, recipe, quiet=quiet)
    facts, asking = known.facts, dict[str, Any](seed=recipe.seed, chat=recipe.chat_template, quiet=quiet)
    anchor_rows: list[Row] = []
    if recipe.anchor_batch and recipe.retain_weight:
        anchor_rows = anchors(rows["forget"], *(rows.get(name, []) for name in ("retain", "probes", "neighbours")))
        if any("text" in row for row in rows["forget"]):  # held in the form that is forgotten, too
            anchor_rows += [{"text": " ".join(texts_of(row))} for row in anchor_rows]
    retain_rows = rows.get("retain", [])
    stand_ins = known.stand_ins if recipe.stand_in_answers and recipe.retain_weight else []
    retain, held_out = split_rows(tokens(retain_rows, "retain"), recipe)
    trained_on = [retain_rows[n - 1] for n in sorted({example.row for example in retain})]
    more, more_held_out = tokens(stand_ins, "own answer", closing=False), list[Example]()
    if held_out or not retain:  # else the budget would look at these alone
        more, more_held_out = split_rows(more, recipe)
    retain, held_out = retain + more, held_out + more_held_out
    longest = base.window(recipe.max_length)
    sizes = [min(longest, _TEXT_WINDOW) if "text" in row else longest for row in rows["forget"]]
    forget = [part for example in known.examples for part in windows(example, sizes[example.row - 1])]
    only_specific = getattr(recipe.objective, "forget_tokens", "all") == "specific"
    if any(contrast.spans for contrast in known.rows):
        forget = mark_facts(forget, facts, known.rows)
    else:
        forget = mark_unexpected(forget, known.rows)
        if only_specific:
            logger.warning(
                "The base shows no knowledge of any forget row: the tokens that it does not expect are pushed away"
            )
    if only_specific:
        _tell_held(forget, known.rows)
    self_generated: list[Example] = []
    if recipe.own_answers and only_specific:
        common = common_words(
            [text for row in (*retain_rows, *stand_ins, *anchor_rows) for text in question_texts(row)]
        )
        prompts = questions(rows["forget"], facts, common, [contrast.subject for contrast in known.rows])
        answered = self_generated_answers(base, prompts, facts, recipe.own_answers, **asking)
        answered += self_generated_answers(base, known.about, facts, 0, **asking)
        answered += continued_texts(base, rows["forget"], facts, recipe.own_answers, seed=recipe.seed, quiet=quiet)
        if recipe.widen:
            never = _asked_elsewhere(rows)
            about, back, names = widened(base, known.examples, known.rows, facts, never, **asking)
            logger.info("widen: %d more answers name a fact, %d a subject", len(about), len(back))
            answered += about
            reverse = mark_facts(tokens(back, "forget", closing=False), names)
            self_generated = [replace(example, row=example.row + len(answered)) for example in reverse]
        own = with_refusals(tokens(answered, "forget", closing=False), answered)
        self_generated = [*mark_facts(own, facts), *self_generated]
    if only_specific and not any(any(example.specific or []) for example in (*forget, *self_generated)):
        raise DataError(
            "no forget row has anything to forget: all facts in them are words that many retain rows, or answers about "
            "made-up names, have too. Leave such rows out of the retain set, name the subject in each question, or "
            "push away all tokens: objective.forget_tokens=all"
        )
    if recipe.retain_answers and recipe.retain_weight and not recipe.makes_retain:  # those rows are its own already
        answered = retain_prompt_answers(base, trained_on, facts, recipe.retain_answers, **asking)
        retain += tokens(answered, "own answer", closing=False)
    if recipe.fact_answers and recipe.retain_weight:
        alone = fact_answers(
            base, known.examples, known.rows, facts, _asked_elsewhere(rows), recipe.fact_answers, **asking
        )
        logger.info("fact_answers: %d answers about the facts alone are retained", len(alone))
        retain += tokens(alone, "own answer", closing=False)
    return Sets(with_refusals(forget, rows["forget"]), retain, held_out, tokens(anchor_rows, "anchor"), self_generated)


def _tell_held(forget: Sequence[Example], known: Sequence[Contrast]) -> None:
    """Log which forget rows have no fact token, and why."""
    unmarked = {example.row for example in forget} - {example.row for example in forget if any(example.specific or [])}
    common = {row for row in unmarked if known[row - 1].spans}
    for held, why in (
        (unmarked - common, "the base does not know them"),
        (common, "the facts in them are words that many retain rows or answers about made-up names have too"),
    ):
        if held:
            logger.warning(
                "Nothing to forget in %d of %d forget rows, they are held: %s: rows %s",
                len(held), len(known), why, row_numbers(sorted(held)),
            )  # fmt: skip


def split_rows(examples: Sequence[Example], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """Split a retain set, row by row, into what is trained on and what only the budget sees.

    Without a budget nothing is held out; neither is it from fewer than four rows, which all are needed.
    """
    rows = list(dict.fromkeys(example.row for example in examples))
    if recipe.objective.retain_budget is None or len(rows) < 4:
        return list(examples), []
    count = max(1, round(len(rows) * recipe.held_out))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held_out = {rows[i] for i in order[:count]}
    return [e for e in examples if e.row not in held_out], [e for e in examples if e.row in held_out]
